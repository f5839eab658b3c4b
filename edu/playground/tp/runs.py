"""The folder of a run: what stands where, and reading it back.

torch and sentencepiece are imported where weights are read or written: a command that only looks
at metrics need not wait two seconds for them.
"""

import io
import pickle
import re
import shutil
import time
from pathlib import Path

from tp.config import check, config_hash, from_dict, to_dict
from tp.errors import UserError
from tp.files import read_json, read_rows, write_bytes, write_json, write_lines
from tp.tables import is_number, read_object

CHECKPOINTS = ("best_val", "last")


def list_runs(runs_dir):
    """The ids of the runs in a folder, oldest first; [] where there is no such folder."""
    configs = Path(runs_dir).glob("*/config.json")
    return [path.parent.name for path in sorted(configs, key=lambda p: (p.stat().st_mtime, p))]


class Run:
    """runs_dir/run_id: the paths of its files, and what they hold. Making one reads nothing."""

    def __init__(self, runs_dir, run_id):
        self.runs_dir, self.run_id = Path(runs_dir), run_id
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*", run_id):
            raise UserError(f"--run-id {run_id!r}: it names a folder; use letters, digits and ._-")
        self.folder = self.runs_dir / run_id
        self.config_path = self.folder / "config.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.samples_path = self.folder / "samples.jsonl"
        self.summary_path = self.folder / "summary.json"
        self.tokenizer_path = self.folder / "tokenizer" / "spm.model"
        self.reports = self.folder / "reports"

    # ---- making one ------------------------------------------------------------------------------

    @classmethod
    def create(cls, runs_dir, config, run_id=None):
        """A new run with its folders and its config.json. Raises UserError if it is there already.

        Without run_id: the time, and 6 digits that stand for config and seed. The folder itself
        may exist, with a sweep's notes in it; the folder of the checkpoints may not.
        """
        name = time.strftime("%Y%m%d-%H%M%S-") + config_hash(config, with_seed=True)[:6]
        run = cls(runs_dir, name if run_id is None else run_id)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.checkpoint_path("last").parent.mkdir()  # of two processes, one gets it
        except FileExistsError as error:
            raise UserError(f"{run.folder} is there already, and no run is overwritten. Go on with "
                            f"it:\n  tp train --runs-dir {runs_dir} --resume {run.run_id}\n"
                            "or choose another --run-id") from error
        except OSError as error:
            raise UserError(f"cannot make the folder {run.folder}: {error.strerror}") from error
        run.tokenizer_path.parent.mkdir()
        run.reports.mkdir()
        write_json(run.config_path, to_dict(config))
        return run

    def remove(self):
        """Take back what create has just made, and nothing else."""
        for folder in (self.checkpoint_path("last").parent, self.tokenizer_path.parent,
                       self.reports):
            shutil.rmtree(folder)
        self.config_path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    @classmethod
    def open(cls, runs_dir, run_id):
        """A run that exists. Raises UserError with the ids that do."""
        run = cls(runs_dir, run_id)
        if not run.config_path.is_file():
            known = list_runs(runs_dir)
            there = "\n  ".join(known[-8:]) if known else "none; make one with  tp train"
            raise UserError(f"{runs_dir} has no run {run_id!r}. Its runs, newest last:\n  {there}")
        return run

    # ---- settings, metrics, samples --------------------------------------------------------------

    def load_config(self):
        """The RunConfig it was made with. Raises UserError."""
        return from_dict(read_json(self.config_path), self.config_path)

    def load_metrics(self):
        """One dictionary per evaluation; a last line torn by a crash is left out."""
        return read_rows(self.metrics_path)

    def load_samples(self):
        """One dictionary per sample: step, prompt, text."""
        return read_rows(self.samples_path)

    def load_summary(self):
        """summary.json. A status of "running" without such a process is a run that was killed."""
        return read_object(self.summary_path)

    def keep_rows_until(self, step):
        """Drop the metrics and samples of later steps: a resumed run will write them again."""
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                write_lines(path, [row for row in read_rows(path)
                                   if is_number(row.get("step")) and row["step"] <= step])

    # ---- weights ---------------------------------------------------------------------------------

    def checkpoint_path(self, checkpoint):
        return self.folder / "checkpoints" / f"{checkpoint}.pt"

    def save_checkpoint(self, checkpoint, state):
        """Tensors and plain values only, so that no pickle need be executed to read them."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.checkpoint_path(checkpoint), buffer.getvalue())

    def load_checkpoint(self, checkpoint):
        """The dictionary that save_checkpoint was given. Raises UserError."""
        import torch

        path = self.checkpoint_path(checkpoint)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}: run {self.run_id} was stopped before its first "
                            f"evaluation. Go on with it:\n  tp train --runs-dir {self.runs_dir} "
                            f"--resume {self.run_id}") from error
        except (OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
                AssertionError, OverflowError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} is damaged, or no checkpoint: "
                            f"{(str(error) or 'it is empty').splitlines()[0]}") from error
        kinds = {"model": dict, "step": int, "config": dict, "tokenizer_sha256": str}
        wrong = [key for key, kind in kinds.items()
                 if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
        if wrong:
            raise UserError(f"{path} is no checkpoint of tp train: it lacks {', '.join(wrong)}")
        return state

    def load_model(self, checkpoint="best_val"):
        """(model in eval mode, tokenizer, config, state). state: step, val_loss and more.

        Raises UserError, also where the tokenizer is not the one that the weights belong to.
        """
        from tp.model import Transformer
        from tp.tokenizer import load_tokenizer

        state, config = self.load_checkpoint(checkpoint), self.load_config()
        tokenizer = load_tokenizer(self.tokenizer_path)
        if state["tokenizer_sha256"] != tokenizer.sha256:
            raise UserError(f"{self.tokenizer_path} (sha256 {tokenizer.sha256[:12]}) is not the "
                            f"tokenizer of {checkpoint}.pt (sha256 "
                            f"{state['tokenizer_sha256'][:12]}): its ids would mean other text")
        if state["config"].get("model") != to_dict(config)["model"]:
            raise UserError(f"the model in {self.config_path} is not the one that {checkpoint}.pt "
                            "holds the weights of; was the file edited? Undo that: a new model "
                            "needs a new run")
        check(config)
        model = Transformer(config.model, tokenizer.vocab_size)
        try:
            model.load_state_dict(state["model"])
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{self.checkpoint_path(checkpoint)} does not fit "
                            f"{self.config_path}; was one of them edited?\n"
                            f"  {str(error).splitlines()[-1].strip()}") from error
        return model.eval(), tokenizer, config, state
