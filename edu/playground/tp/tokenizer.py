"""Text <-> ids with sentencepiece, trained on the training phrases and on nothing else.

Two choices make it exact: no text normalisation, and every character that the training phrases
lack is spelled in its UTF-8 bytes. So decode(encode(text)) == text for any prompt; the one
exception is the character U+2581, sentencepiece's own sign for a space.
"""

import hashlib
import io
from pathlib import Path

import sentencepiece

from tp.errors import UserError
from tp.files import write_bytes

PAD, UNK, BOS, EOS = 0, 1, 2, 3  # the first four ids; <unk> is never used, as bytes come instead


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; vocab_size; sha256 of the model file."""

    def __init__(self, proto):
        if not proto:  # which sentencepiece takes, to fail at the first text
            raise RuntimeError("an empty file")
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.vocab_size = self.processor.vocab_size()
        self.sha256 = hashlib.sha256(proto).hexdigest()
        self.pad_id, self.bos_id, self.eos_id = PAD, BOS, EOS

    def encode(self, text):
        """Ids of the text alone: no BOS and no EOS, whatever the text spells."""
        return self.processor.encode(text)

    def decode(self, ids):
        """The text; bos, eos and pad leave no trace. Broken UTF-8 becomes U+FFFD."""
        return self.processor.decode(list(ids))


def train_tokenizer(lines, path, config):
    """Train on lines, write path (spm.model, and spm.vocab beside it to read), return a Tokenizer.

    config: TokenizerConfig. One thread, no sampling: the same lines give the same bytes. Where the
    lines do not hold enough for vocab_size pieces, there are fewer. Raises UserError.
    Source: Kudo 2018 (unigram), Sennrich et al. 2016 (bpe).
    """
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=proto, model_type=config.kind,
            vocab_size=config.vocab_size, hard_vocab_limit=False, byte_fallback=True,
            character_coverage=1.0, normalization_rule_name="identity",
            remove_extra_whitespaces=False, max_sentence_length=2**20, num_threads=1,
            pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS, minloglevel=2)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tokenizer.vocab_size={config.vocab_size} does not fit these {len(lines)} phrases: "
            f"sentencepiece says: {str(error).splitlines()[0]}\n"
            "  it must hold 256 bytes, 4 specials and every character: --set "
            "tokenizer.vocab_size=1024") from error
    tokenizer = Tokenizer(proto.getvalue())
    pieces = tokenizer.processor
    vocab = "".join(f"{pieces.id_to_piece(i)}\t{pieces.get_score(i):.4f}\n"
                    for i in range(tokenizer.vocab_size))
    write_bytes(path, proto.getvalue())
    write_bytes(Path(path).with_suffix(".vocab"), vocab.encode())
    return tokenizer


def load_tokenizer(path):
    """The Tokenizer of an spm.model. Raises UserError for a file that is none."""
    try:
        return Tokenizer(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except RuntimeError as error:
        raise UserError(f"{path} is not a sentencepiece model, or it is damaged") from error
