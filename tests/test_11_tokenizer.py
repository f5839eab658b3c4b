"""11_tokenizer.py: a slow BPE trainer and a slow encoder, both below, agree with the fast ones."""

import base64
import collections
import json
import random
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from conftest import load, script_path
from tiktoken.load import load_tiktoken_bpe

bpe = load("11_tokenizer")

VOCAB = 400
MERGES = VOCAB - 256 - 9


def some_documents(seed=1, count=60):
    """Made-up prose: Zipf-like words, names, numbers, marks, line ends, and a few other scripts."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(150)]
    words += ["caf\u00e9", "\u4f60\u597d", "\U0001f44d\U0001f3fd", "don't", "WE'LL", "\u043c\u0438"]
    ends = [" ", " ", " ", " ", ", ", ". ", "!?\n", "\r\n\r\n", "  ", " \t"]
    documents = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(5, 80)):
            word = words[min(int(rng.expovariate(0.04)), len(words) - 1)]
            parts.append(str(rng.randint(0, 99999)) if rng.random() < 0.05 else word)
            parts.append(rng.choice(ends))
        documents.append("".join(parts))
    return documents


def write_shards(folder, *shards):
    folder.mkdir(parents=True, exist_ok=True)
    for i, texts in enumerate(shards):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def documents():
    return some_documents()


@pytest.fixture(scope="module")
def ranks(documents):
    return bpe.train_bpe(documents, VOCAB, bpe.split_pattern(1))


@pytest.fixture(scope="module")
def tokenizer(ranks, tmp_path_factory):
    return bpe.save_tokenizer(tmp_path_factory.mktemp("tok"), ranks, bpe.split_pattern(1))


@pytest.fixture()
def data_dir(tmp_path, documents):
    return write_shards(tmp_path / "data", documents[:30], documents[30:50], documents[50:])


# ---- training ------------------------------------------------------------------------------------


def join(parts, pair, union):
    """Replace the pair by its union, from left to right."""
    joined, i = [], 0
    while i < len(parts):
        both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair
        joined.append(union if both else parts[i])
        i += 2 if both else 1
    return joined


def naive_train(texts, merges, pattern):
    """BPE as the paper words it: recount every pair before every merge."""
    pieces = collections.Counter(p for text in texts for p in regex.findall(pattern, text))
    pieces = [(list(piece.encode()), count) for piece, count in pieces.items()]
    tokens = [bytes([i]) for i in range(256)]
    for _ in range(merges):
        pairs = collections.Counter()
        for parts, count in pieces:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces = [(join(parts, best, len(tokens)), count) for parts, count in pieces]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("digits", [1, 2])
def test_the_merges_are_those_of_a_naive_trainer_that_recounts_every_pair(documents, digits):
    pattern = bpe.split_pattern(digits)
    ranks = bpe.train_bpe(documents, VOCAB, pattern)
    assert sorted(ranks, key=ranks.get) == naive_train(documents, MERGES, pattern)
    assert sorted(ranks.values()) == list(range(256 + MERGES))


def test_of_equally_common_pairs_the_smaller_pair_of_ids_goes_first():
    """Pieces `ab` and ` cd`: the pairs (97, 98), (32, 99), (99, 100) are seen once each.

    (32, 99) is smallest: token 256 is ` c`. Then (97, 98) is before (256, 100): 257 is `ab`.
    """
    ranks = bpe.train_bpe(["ab cd"], 256 + 3 + 9, bpe.split_pattern(1))
    assert sorted(ranks, key=ranks.get)[256:] == [b" c", b"ab", b" cd"]


def test_overlapping_pairs_count_twice_but_merge_once():
    """`aaa` holds the pair aa twice, so it is first; bc (98, 99) goes before aa+a (256, 97)."""
    ranks = bpe.train_bpe(["bc\naaa"], 256 + 3 + 9, bpe.split_pattern(1))
    assert sorted(ranks, key=ranks.get)[256:] == [b"aa", b"bc", b"aaa"]


def test_training_again_or_on_shuffled_documents_gives_the_same_merges(documents, ranks):
    for seed in range(3):
        shuffled = random.Random(seed).sample(documents, len(documents))
        assert bpe.train_bpe(shuffled, VOCAB, bpe.split_pattern(1)) == ranks


def test_no_token_straddles_two_words_or_holds_more_digits_than_asked_for(documents):
    texts = [*documents, "in 1234 and the 1234! " * 999]
    for digits in (1, 2, 3):
        ranks = bpe.train_bpe(texts, VOCAB, bpe.split_pattern(digits))
        most = max(sum(48 <= byte < 58 for byte in token) for token in ranks)
        assert most == digits
        assert not any(regex.search(rb"\w ", token) for token in ranks)


def test_the_cap_on_spaces_changes_no_split_of_ordinary_text(documents):
    """GPT-4's pattern with one digit, as published, cuts the same pieces."""
    published = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
        r"\s*[\r\n]|\s+(?!\S)|\s+"
    )
    texts = [*documents, *bpe.AWKWARD_TEXTS, " " * 999 + "x" + "\t\n  " * 99 + "end   "]
    for text in texts:
        assert regex.findall(bpe.split_pattern(1), text) == regex.findall(published, text)


# ---- encoding and decoding -----------------------------------------------------------------------


def naive_encode(text, tokens, pattern):
    """Replay every merge in the order of training over each piece."""
    whole = {token: i for i, token in enumerate(tokens)}
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        for token in tokens[256:]:
            if len(parts) == 1:
                break
            for pair in set(zip(parts, parts[1:])):
                if pair[0] + pair[1] == token:
                    parts = join(parts, pair, token)
        ids += [whole[part] for part in parts]
    return ids


def test_tiktoken_encodes_as_replaying_the_merges_in_order_does(tokenizer, ranks, documents):
    tokens, pattern = sorted(ranks, key=ranks.get), bpe.split_pattern(1)
    texts = documents[:8] + some_documents(seed=2, count=8) + list(bpe.AWKWARD_TEXTS[:-1])
    for text in texts:
        assert tokenizer.encode(text) == naive_encode(text, tokens, pattern), text


def test_the_merges_shown_by_hand_end_where_tiktoken_ends(tokenizer, ranks):
    chinese = "\u4f60\u597d".encode()
    for word in (b"a", b" hello", b" thesaurus", chinese, b"eeeeeee", b"\xff\xfe"):
        *_, parts = bpe.merge_steps(word, ranks)
        assert b"".join(parts) == word
        assert [ranks[part] for part in parts] == tokenizer.encoding._encode_single_piece(word)


def test_any_text_comes_back(tokenizer):
    rng = random.Random(3)
    ranges = [(0, 128), (0, 0x800), (0, 0xD800), (0xE000, 0x110000)]  # all but surrogates
    for _ in range(300):
        low, high = rng.choice(ranges)
        text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(0, 40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in ("a\r\nb\rc\n\n", "\x00", "\ufeff", "\U0001f468\u200d\U0001f469\u200d", ""):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_any_ids_give_their_bytes_even_where_those_are_no_utf8(tokenizer, ranks):
    tokens, rng = sorted(ranks, key=ranks.get), random.Random(4)
    assert [tokenizer.decode_bytes([i]) for i in range(256)] == [bytes([i]) for i in range(256)]
    for _ in range(100):
        ids = rng.choices(range(len(tokens)), k=rng.randint(1, 20))
        assert tokenizer.decode_bytes(ids) == b"".join(tokens[i] for i in ids)
    assert tokenizer.decode([0xE4, 0xBD]) == "\ufffd"  # two bytes of three: half a letter


def test_lone_surrogates_become_the_replacement_character_and_pairs_their_emoji(tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")
    assert tokenizer.encode(["x\udfff"]) == [tokenizer.encode("x\ufffd")]


def test_text_that_spells_a_special_token_never_becomes_one(tokenizer):
    text = "hi " + "".join(bpe.SPECIAL_TOKENS) + " <|endoftext|>"
    assert max(tokenizer.encode(text)) < VOCAB - 9
    assert max(map(max, tokenizer.encode([text, text]))) < VOCAB - 9
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_nine_special_tokens_stand_at_the_end_of_the_id_space(tokenizer):
    names = """<|bos|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|>
               <|python_start|> <|python_end|> <|output_start|> <|output_end|>""".split()
    assert [tokenizer.encode_special(name) for name in names] == list(range(VOCAB - 9, VOCAB))
    assert [tokenizer.decode([i]) for i in range(VOCAB - 9, VOCAB)] == names
    assert tokenizer.get_vocab_size() == VOCAB
    assert tokenizer.get_bos_token_id() == VOCAB - 9
    for no_special in ("a", "<|endoftext|>", " t"):
        with pytest.raises(KeyError):
            tokenizer.encode_special(no_special)


def test_prepend_and_append_take_a_special_token_or_an_id(tokenizer):
    plain = tokenizer.encode("so it is")
    assert tokenizer.encode("so it is", prepend="<|bos|>", append=0) == [VOCAB - 9, *plain, 0]
    rows = tokenizer.encode(["so it is", ""], VOCAB - 9, append="<|user_end|>", num_threads=2)
    assert rows == [[VOCAB - 9, *plain, VOCAB - 7], [VOCAB - 9, VOCAB - 7]]


def test_token_bytes_are_raw_lengths_and_add_up_to_the_text(tokenizer, documents):
    """A lone byte 0x80 is one byte, though it decodes to U+FFFD, which would be three."""
    lengths = tokenizer.token_bytes()
    assert len(lengths) == VOCAB and lengths[:256] == [1] * 256 and lengths[-9:] == [0] * 9
    for text in documents:
        ids = tokenizer.encode(text, prepend="<|bos|>")
        assert sum(lengths[i] for i in ids) == len(text.encode())


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "x", "7" * 10**6, "\n " * 500_000,
                                  "".join(random.Random(5).choices("etaoin", k=10**6))],
                         ids=["a", "space", "digit", "newline", "letters"])
def test_a_megabyte_without_a_break_neither_hangs_nor_overflows_the_stack(tokenizer, text):
    """Measured: 0.05 to 0.6 s each. Quadratic code would take hours, GPT-4's pattern panics."""
    began = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    bpe.train_bpe([text, *some_documents(count=5)], 280, bpe.split_pattern(1))
    assert time.perf_counter() - began < 15


# ---- artefacts -----------------------------------------------------------------------------------


def test_the_rank_file_is_tiktokens_own_and_reads_back_with_tiktokens_own_reader(tmp_path, ranks):
    bpe.save_tokenizer(tmp_path, ranks, bpe.split_pattern(1))
    assert load_tiktoken_bpe(str(tmp_path / "tokenizer.tiktoken")) == ranks
    lines = (tmp_path / "tokenizer.tiktoken").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(256 + MERGES))
    assert base64.b64decode(lines[65].split()[0]) == b"A"


def test_the_identity_changes_with_ranks_pattern_and_special_tokens_and_nothing_else(
    tmp_path, ranks, tokenizer
):
    pattern = bpe.split_pattern(1)
    assert bpe.save_tokenizer(tmp_path / "a", ranks, pattern, note=1).sha256 == tokenizer.sha256
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["sha256"] == tokenizer.sha256 and config["vocab_size"] == VOCAB
    swapped = dict(ranks)
    x, y = list(ranks)[-2:]
    swapped[x], swapped[y] = ranks[y], ranks[x]
    others = [
        bpe.save_tokenizer(tmp_path / "b", swapped, pattern).sha256,
        bpe.save_tokenizer(tmp_path / "c", ranks, bpe.split_pattern(2)).sha256,
        bpe.Tokenizer.identity(b"", pattern, {"<|bos|>": 256}),
        bpe.Tokenizer.identity(b"", pattern, {"<|bos|>": 257}),
    ]
    assert len({tokenizer.sha256, *others}) == 5


@pytest.mark.parametrize("damage, word", [
    (lambda d: (d / "config.json").unlink(), "no tokenizer"),
    (lambda d: (d / "tokenizer.tiktoken").unlink(), "no tokenizer"),
    (lambda d: (d / "config.json").write_text("{"), "damaged"),
    (lambda d: (d / "config.json").write_text("[]"), "damaged"),
    (lambda d: (d / "config.json").write_text("{}"), "damaged"),
    (lambda d: (d / "tokenizer.tiktoken").write_bytes(b"YQ== 0\n"), "sha256"),
])
def test_an_absent_or_damaged_tokenizer_is_named_with_the_command_that_makes_one(
    tmp_path, ranks, damage, word
):
    folder = tmp_path / "tokenizer"
    bpe.save_tokenizer(folder, ranks, bpe.split_pattern(1))
    damage(folder)
    with pytest.raises(bpe.UserError) as error:
        bpe.Tokenizer.from_dir(folder)
    assert word in str(error.value) and str(folder) in str(error.value)
    assert f"python edu/11_tokenizer.py --data-dir {tmp_path}" in str(error.value)


# ---- the command line ----------------------------------------------------------------------------


def test_the_script_trains_writes_and_reports_and_needs_no_torch(data_dir, documents):
    """In a process of its own: two seconds are generous, and a torch import would eat them."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['11', '--data-dir', {str(data_dir)!r}, '--vocab-size', '{VOCAB}']\n"
        f"try: runpy.run_path({str(script_path('11_tokenizer'))!r}, run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "exit 0 False", done.stdout + done.stderr
    assert done.stderr == ""
    assert "11 tokenizer - cpu - 400 tokens" in done.stdout.splitlines()[0]
    assert "gpt2 not compared" in done.stdout
    tokenizer = bpe.Tokenizer.from_dir(data_dir / "tokenizer")
    train = bpe.train_bpe(documents[:50], VOCAB, bpe.split_pattern(1))
    assert tokenizer.encoding._mergeable_ranks == train
    val = documents[50:]
    share = sum(len(t.encode()) for t in val) / sum(len(tokenizer.encode(t)) for t in val)
    n = sum(len(text.encode()) for text in val)
    assert f"result: val bytes per token 1.00 -> {share:.2f} (n={n})" in done.stdout
    assert not list((data_dir / "tokenizer").glob(".*")), "a temporary file was left behind"


def test_the_same_tokenizer_comes_out_whatever_the_number_of_threads(run_script, data_dir):
    hashes = []
    for threads in (1, 3):
        done = run_script("11_tokenizer", "--vocab-size", "500", "--no-gpt2", data_dir=data_dir,
                          env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads})
        assert done.returncode == 0, done.stderr
        hashes.append(bpe.Tokenizer.from_dir(data_dir / "tokenizer").sha256)
    assert hashes[0] == hashes[1]


def test_the_validation_shard_takes_no_part_in_training(tmp_path, documents):
    data = write_shards(tmp_path, documents[:20], ["zyzzyva " * 5000])
    assert bpe.main(["--data-dir", str(data), "--vocab-size", "300", "--no-gpt2"]) == 0
    tokens = bpe.Tokenizer.from_dir(data / "tokenizer").encoding._mergeable_ranks
    assert not any(b"zy" in token for token in tokens)


def test_max_chars_and_doc_cap_limit_what_is_read(data_dir, documents):
    paths = bpe.list_shards(data_dir)
    train = documents[:50]
    assert list(bpe.training_texts(paths, 10**9, 10**9)) == train
    assert list(bpe.training_texts(paths, 10**9, 7)) == [text[:7] for text in train]
    capped = list(bpe.training_texts(paths, 500, 10**9))
    assert "".join(capped) == "".join(train)[:500]


def test_gpt2_that_never_answers_is_given_up_after_the_stated_patience(run_script, data_dir):
    """A server that accepts and stays silent, as the proxy to everywhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.perf_counter()
        done = run_script("11_tokenizer", "--vocab-size", "300", "--gpt2-patience", "0.5",
                          data_dir=data_dir, timeout=30,
                          env={"HTTPS_PROXY": proxy, "https_proxy": proxy,
                               "TIKTOKEN_CACHE_DIR": data_dir / "no-cache"})
    assert done.returncode == 0 and done.stderr == ""
    assert "gpt2 not compared (no answer within 0.5 s)" in done.stdout
    assert time.perf_counter() - began < 15


@pytest.mark.parametrize("arguments, words", [
    (["--vocab-size", "9000"], ["--vocab-size 9000", "8735 merges", "characters of text"]),
    (["--vocab-size", "265"], ["--vocab-size 265", "no merge"]),
    (["--digits", "0"], ["--digits 0"]),
    (["--max-chars", "0"], ["--max-chars"]),
    (["--data-dir", "nowhere"], ["nowhere", "01_download.py"]),
])
def test_a_users_mistake_is_one_message_and_exit_code_2(data_dir, capsys, arguments, words):
    assert bpe.main(["--data-dir", str(data_dir), "--no-gpt2", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not (data_dir / "tokenizer").exists()


def test_the_vocabulary_offered_when_text_runs_short_is_one_that_works(tmp_path, capsys):
    data = write_shards(tmp_path, ["to be or not to be"], ["that is the question"])
    assert bpe.main(["--data-dir", str(data), "--no-gpt2"]) == 2
    offer = capsys.readouterr().err.split("--vocab-size")[-1].strip()
    assert bpe.main(["--data-dir", str(data), "--no-gpt2", "--vocab-size", offer]) == 0


def test_a_text_without_any_ascii_gets_a_tokenizer_too(tmp_path, capsys):
    data = write_shards(tmp_path, ["天地玄黃宇宙洪荒" * 9], ["日月盈昃"])
    assert bpe.main(["--data-dir", str(data), "--no-gpt2", "--vocab-size", "270"]) == 0
    assert "how a word grows" in capsys.readouterr().out


def test_a_single_shard_is_refused_because_the_last_one_is_validation(tmp_path, capsys):
    data = write_shards(tmp_path, ["some text"])
    assert bpe.main(["--data-dir", str(data)]) == 2
    assert "shard_00000.parquet, and the last shard is validation" in capsys.readouterr().err
