#!/usr/bin/env bash
# The whole life cycle, from raw parquet bytes to a model that speaks: see life_cycle() below.

# ---- help ----------------------------------------------------------------------------------------

print_help() {
    cat <<'HELP'
usage: [NAME=VALUE ...] bash my_pipeline.sh          run what is not up to date, print the table
       bash my_pipeline.sh setup [tests]             only make .venv and install requirements.txt
       bash my_pipeline.sh --help

  DATA=tiny              the tiny world of edu/00_tiny_world.py, no network needed (default)
  DATA=fineweb-edu       the real source: shards from the hub (or from $HF_ENDPOINT)
  DATA=dir:PATH          your own shards: PATH/shard_00000.parquet, ..., one string column `text`
  NUM_SHARDS=N           shards to take, the last one is for validation (default: all of a world or
                         folder, 4 of fineweb-edu)
  FRESH=1                redo every stage, also those that are up to date
  EDU_DATA=DIR           where everything lands (default: data, data/fineweb-edu, data/dir-NAME)
  WORLD_FLAGS="..."      more flags for one stage: CHECK_, WORLD_, DOWNLOAD_, TOKENIZER_, PRETRAIN_,
                         ENGINE_, IDENTITY_, SFT_, RL_, COMPARE_, EVALUATE_, REPORT_FLAGS;
                         for example PRETRAIN_FLAGS="--depth 2 --max-minutes 1"
  PYTHON=python3.12      the interpreter to make .venv with (3.10 or newer; default: python3)

A stage is up to date while its script, flags, inputs and outputs are those of the run that made it.
HELP
}

# ---- the map -------------------------------------------------------------------------------------
# stage NAME SCRIPT [reads FILES] [writes FILES] [resumes FILE] [mirrors FOLDER] [fresh FLAG]
#       [flags ...]
#   reads, writes   what the stage is made from and makes, in the data folder; a stage that writes
#                   nothing always runs
#   resumes FILE    a run that was stopped goes on with --resume when it has left FILE
#   mirrors FOLDER  outputs that are not byte for byte those of FOLDER are stale: removed first
#   fresh FLAG      what FRESH=1 adds, for a script that knows by itself what is up to date
#   flags           @served@ becomes http://127.0.0.1:PORT, where the data folder is served

life_cycle() {
    stage check     03_check_setup.py
    # any corpus: the chats and word problems of the later stages come from here
    stage world     00_tiny_world.py    writes 'mirror/shard_*.parquet' 'tiny_*.jsonl' 'tiny_eval/*'
    if [ "$source" = mirror ]; then
        stage download 01_download.py   reads 'mirror/shard_*.parquet'  writes 'shard_*.parquet' \
            mirrors mirror              flags --base-url @served@/mirror --num-shards "$num_shards"
    elif [ "$source" = hub ]; then
        stage download 01_download.py   writes 'shard_*.parquet' \
                                        flags --num-shards "$num_shards"
    else
        stage download 01_download.py   reads "$source/shard_*.parquet" writes 'shard_*.parquet' \
            mirrors "$source"           flags --base-url "$source" --num-shards "$num_shards"
    fi
    stage tokenizer 11_tokenizer.py     reads 'shard_*.parquet'         writes 'tokenizer/*'
    stage pretrain  12_pretrain.py      reads 'shard_*.parquet' 'tokenizer/*' \
        resumes base/resume.pt          writes base/model.safetensors base/config.json
    stage engine    05_engine.py        reads 'tokenizer/*' base/model.safetensors \
                                        flags ${prompts[@]+--prompt "${prompts[@]}"}
    # more than its default of 100: each new wording of a question teaches a small model to hear it
    stage identity  06_identity.py      writes my_identity.jsonl my_identity_test.jsonl \
                                        flags --num-conversations 400
    stage sft       08_sft.py           reads base/model.safetensors 'tokenizer/*' 'tiny_*.jsonl' \
        my_identity{,_test}.jsonl       resumes sft/resume.pt \
                                        writes sft/model.safetensors sft/config.json
    stage rl        10_rl.py            reads sft/model.safetensors 'tokenizer/*' 'tiny_gsm_*' \
        resumes rl/resume.pt            writes rl/model.safetensors rl/config.json
    stage compare   05_engine.py        flags --compare base sft rl
    stage evaluate  14_evaluate.py      reads 'shard_*.parquet' 'tokenizer/*' 'tiny_*.jsonl' \
        'tiny_eval/*' {base,sft,rl}/model.safetensors writes {base,sft,rl}/eval.json \
                                        fresh --fresh flags --compare base,sft,rl
    # it reads all there is and takes seconds, so it runs each time
    stage report    17_report.py        flags --stages base sft rl
    in_background table "${stages[@]}"
    echo "this run took $SECONDS s"
}

# ---- what was asked for --------------------------------------------------------------------------

fail() {  # fail EXIT_CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

absolute() {  # PATH as seen from where the user called us
    case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$called_from/$1" ;; esac
}

same_command() {  # the command that goes on with this run: FRESH would begin it again
    local name
    for name in DATA NUM_SHARDS EDU_DATA {CHECK,WORLD,DOWNLOAD,TOKENIZER,PRETRAIN,ENGINE}_FLAGS \
        {IDENTITY,SFT,RL,COMPARE,EVALUATE,REPORT}_FLAGS; do
        case ${!name:-} in
            "") ;;
            *\'*) printf '%s=%q ' "$name" "${!name}" ;;
            *[!A-Za-z0-9_./:-]*) printf "%s='%s' " "$name" "${!name}" ;;
            *) printf '%s=%s ' "$name" "${!name}" ;;
        esac
    done
    echo "bash my_pipeline.sh"
}

choose_data() {  # sets source, data (the folder for everything), num_shards and prompts
    local choice=${DATA:-tiny} folder=
    prompts=("Once upon a time" "The most important thing is")
    case $choice in
        tiny) source=mirror data=data num_shards=${NUM_SHARDS:-0} prompts=() ;;
        fineweb-edu) source=hub data=data/fineweb-edu num_shards=${NUM_SHARDS:-4} ;;
        dir:?*)
            folder=$(absolute "${choice#dir:}")
            check_folder "$folder"
            source=$(cd "$folder" && pwd -P)
            data=data/dir-$(basename "$source") num_shards=${NUM_SHARDS:-0}
            ;;
        *) fail 2 "DATA=$choice is no source: use tiny, fineweb-edu or dir:PATH" ;;
    esac
    case $num_shards in
        1 | *[!0-9]*) fail 2 "NUM_SHARDS=$num_shards: it must be a number of at least 2 (the last \
shard is for validation), or 0 for all" ;;
    esac
    # Shards of two sources must never meet in one folder, so each source has its own. A folder
    # chosen with EDU_DATA is taken as it is: 01_download.py refuses to mix sources there.
    [ -z "${EDU_DATA:-}" ] || data=$(absolute "$EDU_DATA")
    mkdir -p "$data" || fail 2 "cannot make the data folder $data: choose another with EDU_DATA=DIR"
    [ "$source" != "$(cd "$data" && pwd -P)" ] || fail 2 "DATA=$choice is the folder that this run \
would write into, and your shards are never changed: choose another with EDU_DATA=DIR"
    export EDU_DATA=$data
}

check_folder() {  # a folder of the user's own: shard_00000.parquet and at least one more, no gap
    local count=0 all
    [ -d "$1" ] || fail 2 "DATA=dir:$1: there is no such folder"
    while [ -f "$1/$(printf 'shard_%05d.parquet' $count)" ]; do count=$((count + 1)); done
    all=$(find "$1/" -maxdepth 1 -name 'shard_*.parquet' | wc -l)
    [ "$count" -ge 2 ] || fail 2 "DATA=dir:$1 has $count of the 2 shards needed at least: \
shard_00000.parquet to train on, shard_00001.parquet for validation"
    [ "$count" -eq "$all" ] || fail 2 "DATA=dir:$1 holds $((all)) shards, but after the first \
$count the next number is missing: number them shard_00000.parquet, shard_00001.parquet, ..."
}

# ---- set-up --------------------------------------------------------------------------------------

setup() {  # setup run|tests: .venv with the packages, done once for each state of the lists
    local lists=(requirements.txt) stamp=.venv/.installed-$1 python=${PYTHON:-python3}
    [ "$1" = run ] || lists+=(tests/requirements.txt)
    if [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -V 2>&1)" = "$(.venv/bin/python -V 2>&1)" ]; then
        [ "$(fingerprint "${lists[@]}")" != "$(cat "$stamp" 2>/dev/null)" ] || return 0
        .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv "$python"
    else
        make_venv "$python"
    fi
    echo "set-up: installing ${lists[*]} into .venv (once; minutes, most of it for torch)"
    rm -f "$stamp"
    # The last list includes the ones before it.
    .venv/bin/python -m pip install --disable-pip-version-check $([ -t 1 ] || echo --quiet) \
        -r "${lists[${#lists[@]} - 1]}" ||
        fail $? "pip could not install ${lists[*]}; its message is above. What it has installed \
stays: the same command goes on from there"
    fingerprint requirements.txt >.venv/.installed-run
    fingerprint "${lists[@]}" >"$stamp"
}

fingerprint() {  # of the lists and of the Python they are for; "none" when that does not run
    .venv/bin/python -c 'import hashlib, sys
text = sys.version.encode() + b"".join(open(name, "rb").read() for name in sys.argv[1:])
print(hashlib.sha256(text).hexdigest())' "$@" 2>/dev/null || echo none
}

make_venv() {  # make_venv INTERPRETER
    local found
    found=$("$1" -c 'import sys; print(sys.version.split()[0])' 2>&1) || fail 2 "'$1' does not run \
($found): install Python 3.10 or newer, or name one with PYTHON=/path/to/python3"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail 2 "'$1' is Python $found, \
and the scripts need 3.10 or newer: name one with PYTHON=/path/to/python3"
    "$1" -c 'import ensurepip, venv' 2>/dev/null || fail 2 "'$1' comes without the venv module, \
which keeps the packages of this project apart: on Debian or Ubuntu, sudo apt install python3-venv"
    echo "set-up: making .venv with Python $found"
    "$1" -m venv --clear .venv || fail $? "'$1' could not make .venv; its message is above"
}

# ---- running a stage -----------------------------------------------------------------------------

stage() {  # see the map
    current=$1
    stages+=("$1")
    if [ "${FRESH:-0}" = 0 ]; then unset FRESH; else export FRESH; fi
    in_background stage "$@" ||
        fail $? "stage $1 stopped the run; its own message is above. Then go on with: $command"
}

in_background() {  # so that a signal to this shell is answered at once, not when the stage is over
    .venv/bin/python -I -S -u -c "$RUNNER" "$@" &
    child=$!
    wait "$child"
}

stop() {  # stop SIGNAL EXIT_CODE: pass it on, let the stage save what it wants to save
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -s "$1" "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    printf '\nstopped in stage %s; go on with: %s\n' "$current" "$command" >&2
    exit "$2"
}

# Runs one stage: decides whether it is up to date, measures it, remembers what it was made from.
read -r -d '' RUNNER <<'PYTHON_CODE' || true
import contextlib, filecmp, hashlib, json, os, re, resource, shlex, signal, subprocess, sys, time
from pathlib import Path

data, root = Path(os.environ["EDU_DATA"]), Path.cwd()
memory = data / ".pipeline"  # one file per stage that has finished, one per stage that has begun
KEYWORDS = ("reads", "writes", "resumes", "mirrors", "fresh", "flags")


def fail(message, code=2):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def read_json(path):
    """Its content, or {} when it is absent or damaged: then the stage simply runs again."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path, value):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def files(patterns):
    """{path: [size, mtime]} of the files that match, in the data folder unless absolute."""
    found = {}
    for pattern in patterns:
        folder, name = os.path.split(pattern)
        for path in Path(data, folder).glob(name):
            if path.is_file():
                found[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
    return found


def split_plan(words):
    """{keyword: the words after it}; `flags` is the last keyword, whatever words follow."""
    plan, key = {name: [] for name in KEYWORDS}, None
    for word in words:
        if word in KEYWORDS and key != "flags":
            key = word
        else:
            plan[key].append(word)
    return plan


def run_stage(name, script, *words):
    plan, done, begun = split_plan(list(words)), memory / f"{name}.json", memory / f"{name}.begun"
    try:
        plan["flags"] += shlex.split(os.environ.get(f"{name.upper()}_FLAGS", ""))
    except ValueError as error:
        fail(f"{name.upper()}_FLAGS cannot be split into words: {error}")
    path = root / "edu" / script
    if not path.is_file():
        fail(f"there is no edu/{script}")
    code = hashlib.sha256(path.read_bytes()).hexdigest()
    made_from = {"script": script, "code": code, "flags": plan["flags"],
                 "inputs": files(plan["reads"])}
    before, fresh = read_json(done), os.environ.get("FRESH")
    outputs = files(plan["writes"])
    if (not fresh and outputs and made_from == before.get("made_from")
            and outputs == before.get("outputs")):
        print(f"\n== {name}: up to date ({before['row']['seconds']:.0f} s when it ran)")
        return 0

    flags = plan["flags"] + (plan["fresh"] if fresh else [])
    saved = files(plan["resumes"])
    if not fresh and saved and made_from == read_json(begun).get("made_from"):
        # only what this very run has saved since it began, not a finished run's last state
        if min(mtime for _, mtime in saved.values()) > begun.stat().st_mtime_ns:
            flags.append("--resume")
    done.unlink(missing_ok=True)
    if "--resume" not in flags:
        memory.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"made_from": made_from})
    for folder in plan["mirrors"]:
        same_flags = plan["flags"] == before.get("made_from", {}).get("flags")
        remove_stale(plan["writes"], data / folder, keep_twins=same_flags)

    with served(any("@served@" in flag for flag in flags)) as url:
        flags = [flag.replace("@served@", url) if url else flag for flag in flags]
        where = "" if str(data) == "data" else f"EDU_DATA={shlex.quote(str(data))} "
        print(f"\n== {name}: {where}python edu/{script} {shlex.join(flags)}".rstrip())
        code, seconds, result = run_and_watch([sys.executable, f"edu/{script}", *flags])
    if code:
        return code
    for pattern in plan["writes"]:
        if not files([pattern]):
            fail(f"edu/{script} ended well, but there is no {data / pattern}", 1)
    # ru_maxrss: of the largest process among those that were started here; bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak_mb = round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
    row = {"stage": name, "seconds": round(seconds, 1), "peak_mb": peak_mb, **result}
    memory.mkdir(parents=True, exist_ok=True)
    write_json(done, {"made_from": made_from, "outputs": files(plan["writes"]), "row": row,
                      "run": os.environ["PIPELINE_RUN"]})
    begun.unlink(missing_ok=True)
    return 0


def remove_stale(patterns, source, keep_twins):
    """Remove shards of an older state of `source`: a downloader takes what is whole for done.

    keep_twins: a shard that still is what the source has may stay, and need not be copied again.
    """
    note = data / ".shards_from"  # by 01_download.py
    origin = note.read_text("utf-8").rstrip("/") if note.is_file() else ""
    for path in map(Path, files(patterns)):
        twin = source / path.name
        if keep_twins and twin.is_file() and filecmp.cmp(path, twin, shallow=False):
            continue
        if origin.rpartition("/")[2] != source.name:
            fail(f"{path} does not come from {source}, and two corpora must not be mixed: move it "
                 "away, or choose another folder with EDU_DATA=DIR")
        path.unlink()


@contextlib.contextmanager
def served(wanted):
    """The data folder over HTTP, on a free port of this machine alone, while the block lasts."""
    if not wanted:
        yield None
        return
    import functools, http.server, threading  # slow to import, and needed by one stage only

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=data)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_and_watch(command):
    """Pass a process's output on; (exit code, seconds, what its last `result:` line says)."""
    processes, asked = [], []

    def pass_on(number, _):
        """First a polite Ctrl-C, so that it saves; a second one, later than a bounce, kills."""
        if not processes:
            sys.exit(128 + number)
        if not asked:
            os.killpg(processes[0].pid, signal.SIGINT)
        elif time.monotonic() - asked[0] > 1:
            os.killpg(processes[0].pid, signal.SIGKILL)
        asked.append(time.monotonic())

    # Before the start: a background job of a shell ignores Ctrl-C, and would hand that on.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    started = time.monotonic()
    # Its own session, so that a signal comes to it once, from here, not once from each of us.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONUNBUFFERED": "1"}, encoding="utf-8",
                               errors="replace", start_new_session=True)
    processes.append(process)
    result = dict.fromkeys(("metric", "before", "after", "n"))
    for line in process.stdout:
        sys.stdout.write(line)
        found = re.fullmatch(r"result: (.+) (\S+) -> (\S+) \(n=(.*)\)\s*", line)
        if found:
            result = {"metric": found[1], **dict(zip(("before", "after", "n"),
                                                     map(plain_number, found.groups()[1:])))}
    code = process.wait()
    if asked and code == 0:  # it saved and ended in order, but it has not done its job
        code = 130
    return 128 - code if code < 0 else code, time.monotonic() - started, result


def plain_number(text):
    """12, 0.5, None for `-`, or the text itself, as in `14.0 MB`."""
    if text == "-":
        return None
    for kind in (int, float):
        try:
            return kind(text.replace(",", ""))
        except ValueError:
            pass
    return text


def print_table(*names):
    done = [read_json(memory / f"{name}.json") for name in names]
    rows = [stage["row"] for stage in done]
    lines = [("stage", "seconds", "peak MB", "what shows that it worked", "before", "after", "n")]
    for stage, row in zip(done, rows):
        old = "" if stage["run"] == os.environ["PIPELINE_RUN"] else " *"
        cells = [shown(row[key]) for key in ("metric", "before", "after", "n")]
        lines.append((row["stage"] + old, f"{row['seconds']:.1f}", f"{row['peak_mb']:,}", *cells))
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) if i in (0, 3) else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths))).rstrip())
    if any(line[0].endswith("*") for line in lines):
        print("* up to date; the row is of the run that made it")
    write_json(data / "pipeline.json", rows)
    print(f"wrote {data / 'pipeline.json'}")
    return 0


def shown(value):
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


sys.exit({"stage": run_stage, "table": print_table}[sys.argv[1]](*sys.argv[2:]))
PYTHON_CODE

# ---- the command line ----------------------------------------------------------------------------

main() {
    called_from=$PWD
    cd "$(dirname "${BASH_SOURCE[0]}")"
    case "$*" in
        "") ;;
        setup) setup run; exit ;;
        "setup tests") setup tests; exit ;;
        -h | --help) print_help; exit ;;
        *) fail 2 "'$*' is no argument of this script: see bash my_pipeline.sh --help" ;;
    esac
    command=$(same_command)
    stages=() current=none child=
    choose_data
    setup run
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    trap 'stop HUP 129' HUP
    export PIPELINE_RUN=$(date +%s).$$
    echo "zero to rlhf - data: ${DATA:-tiny} - everything lands in $data"
    life_cycle
}

set -euo pipefail
main "$@"
exit
