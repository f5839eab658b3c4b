"""02_dataloader.py: its batches are one plain list of tokens, however it is cut or resumed."""

import io
import itertools
import json
import random
import threading

import loader_bench
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from conftest import EDU, load, load_path, script_path

dataloader = load("02_dataloader")
bpe = load_path(EDU / "11_tokenizer.py", "tokenizer_for_test_02")  # ours, also under --impl

# Row groups per shard: a shard with fewer groups than ranks, uneven groups, the last is validation.
SHARDS = [[4], [7, 7, 2], [3, 3, 3, 1], [5, 2]]


def make_texts(count, seed=1):
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 6))) for _ in range(80)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(count)]
    texts[1] = ""  # nothing but <|bos|>
    texts[5] = " ".join(rng.choices(words, k=600))  # longer than many batches
    texts[8] = "na\u00efve \u4f60\u597d \U0001f44d\U0001f3fd\r\n<|bos|> spelt out <|user_start|>"
    return texts


def write_shard(path, texts, rows_per_group):
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for rows in rows_per_group:
            group, texts = texts[:rows], texts[rows:]
            writer.write_table(pa.table({"text": group}), row_group_size=rows)
    assert not texts


@pytest.fixture(scope="module")
def texts():
    return make_texts(sum(map(sum, SHARDS)))


@pytest.fixture(scope="module")
def groups(texts):
    """The texts of each row group of the training shards, in order over all files."""
    rest = iter(texts)
    return [list(itertools.islice(rest, rows)) for shard in SHARDS[:-1] for rows in shard]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, texts):
    folder, rest = tmp_path_factory.mktemp("data"), iter(texts)
    for i, rows in enumerate(SHARDS):
        shard = list(itertools.islice(rest, sum(rows)))
        write_shard(folder / f"shard_{i:05d}.parquet", shard, rows)
    pattern = bpe.split_pattern(1)
    bpe.save_tokenizer(folder / "tokenizer", bpe.train_bpe(texts, 320, pattern), pattern)
    return folder


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return bpe.Tokenizer.from_dir(data_dir / "tokenizer")


@pytest.fixture(scope="module")
def paths(data_dir):
    return sorted(data_dir.glob("shard_*.parquet"))[:-1]


def plain(texts, tokenizer):
    """The oracle: <|bos|> and every text's ids, one list."""
    return [i for t in texts for i in [tokenizer.get_bos_token_id(), *tokenizer.encode(t)]]


def stream_of(batches):
    """The tokens that batches carry: all inputs, then the last target."""
    assert batches
    ids = [i for inputs, _, _ in batches for i in inputs.flatten().tolist()]
    return ids + [batches[-1][1].flatten()[-1].item()]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(ours, theirs)
    )


# ---- reading -------------------------------------------------------------------------------------


def test_texts_come_in_the_order_of_the_files(paths, groups):
    assert list(dataloader.parquet_texts(paths)) == sum(groups, [])


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_rank_r_reads_row_groups_r_r_plus_w_counted_over_all_files(paths, groups, world_size):
    """8 groups in 3 files, the first with one group only: still every rank has work."""
    shares = [list(dataloader.parquet_texts(paths, r, world_size)) for r in range(world_size)]
    for rank, share in enumerate(shares):
        assert share and share == sum(groups[rank::world_size], [])
    assert sorted(sum(shares, [])) == sorted(sum(groups, []))


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 3)])
def test_start_skips_exactly_that_many_documents(paths, rank, world_size):
    whole = list(dataloader.parquet_texts(paths, rank, world_size))
    for start in range(len(whole) + 2):
        assert list(dataloader.parquet_texts(paths, rank, world_size, start=start)) == whole[start:]


def test_skipped_row_groups_are_never_read(tmp_path):
    """The first group's bytes are ruined: starting after it works, starting in it does not."""
    path = tmp_path / "shard_00000.parquet"
    write_shard(path, [f"text number {i} " * 50 for i in range(12)], [4, 8])
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    assert len(list(dataloader.parquet_texts([path], start=4))) == 8
    with pytest.raises(dataloader.UserError, match="row group 0"):
        list(dataloader.parquet_texts([path], start=3))


def test_documents_of_more_than_one_read_are_whole_and_in_order(tmp_path):
    """1000 rows in one group: several reads of 128, with a start inside the third of them."""
    texts = [f"{i} {'x' * (i % 7)}" for i in range(1000)]
    write_shard(tmp_path / "a.parquet", texts, [1000])
    for start in (None, 1, 127, 128, 129, 300, 999):
        assert list(dataloader.parquet_texts([tmp_path / "a.parquet"], start=start)) == (
            texts[start or 0 :])


def test_the_last_shard_is_validation_and_all_before_it_training(data_dir):
    names = [path.name for path in dataloader.list_shards(data_dir)]
    assert names == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"]
    assert [p.name for p in dataloader.list_shards(data_dir, "val")] == ["shard_00003.parquet"]


# ---- batches -------------------------------------------------------------------------------------


def test_a_small_case_worked_by_hand(tmp_path):
    """Documents `ab` and `c`, each byte a token, <|bos|> 256: the stream is 256 97 98 256 99.

    B=2, T=2 takes all five: inputs [[256, 97], [98, 256]], targets [[97, 98], [256, 99]]. The next
    batch would begin with the 99: document 1, of whose two tokens (256, 99) one is used.
    """
    write_shard(tmp_path / "a.parquet", ["ab", "c"], [2])
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("b", pat_str=bpe.split_pattern(1), mergeable_ranks=ranks,
                                 special_tokens={"<|bos|>": 256})
    batches = list(dataloader.tokenizing_data_loader(
        [tmp_path / "a.parquet"], bpe.Tokenizer(encoding, ""), 2, 2, epochs=1))
    assert len(batches) == 1
    inputs, targets, state = batches[0]
    assert inputs.tolist() == [[256, 97], [98, 256]]
    assert targets.tolist() == [[97, 98], [256, 99]]
    assert (state["epoch"], state["doc"], state["token"]) == (0, 1, 1)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 5), (3, 7), (5, 64)])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_batches_of_an_epoch_are_the_plain_list_of_tokens(
    paths, groups, tokenizer, B, T, threads
):
    expected = plain(sum(groups, []), tokenizer)
    batches = list(dataloader.tokenizing_data_loader(
        paths, tokenizer, B, T, epochs=1, num_threads=threads))
    assert len(batches) == (len(expected) - 1) // (B * T)  # all but the last incomplete batch
    assert stream_of(batches) == expected[: len(batches) * B * T + 1]
    for inputs, targets, _ in batches:
        assert inputs.shape == targets.shape == (B, T)
        assert inputs.dtype == targets.dtype == torch.int64


def test_targets_are_inputs_shifted_by_one_across_rows_and_batches(paths, tokenizer):
    loader = dataloader.tokenizing_data_loader(paths, tokenizer, 3, 7)
    batches = list(itertools.islice(loader, 200))
    inputs = torch.cat([inputs.flatten() for inputs, _, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets, _ in batches])
    assert torch.equal(inputs[1:], targets[:-1])


def test_epochs_follow_each_other_without_a_seam(paths, groups, tokenizer):
    expected = plain(sum(groups, []), tokenizer)
    twice = list(dataloader.tokenizing_data_loader(paths, tokenizer, 3, 7, epochs=2))
    assert len(twice) == (2 * len(expected) - 1) // 21
    assert stream_of(twice) == (expected * 2)[: len(twice) * 21 + 1]
    endless = dataloader.tokenizing_data_loader(paths, tokenizer, 3, 7)
    batches = list(itertools.islice(endless, 5 * len(expected) // 21))
    assert stream_of(batches) == (expected * 6)[: len(batches) * 21 + 1]
    assert batches[-1][2]["epoch"] in (4, 5)


def test_each_rank_streams_its_own_row_groups(paths, groups, tokenizer):
    for rank in range(3):
        batches = list(dataloader.tokenizing_data_loader(paths, tokenizer, 2, 5, rank, 3, epochs=1))
        expected = plain(sum(groups[rank::3], []), tokenizer)
        assert stream_of(batches) == expected[: len(batches) * 10 + 1]
        assert len(batches) == (len(expected) - 1) // 10


def test_only_documents_begin_with_bos_and_text_that_spells_it_does_not_count(
    paths, groups, tokenizer
):
    batches = list(dataloader.tokenizing_data_loader(paths, tokenizer, 1, 1, epochs=1))
    ids = stream_of(batches)
    assert any("<|bos|>" in text for text in sum(groups, []))
    assert ids.count(tokenizer.get_bos_token_id()) == sum(map(len, groups))
    assert ids[0] == tokenizer.get_bos_token_id()


def test_editing_targets_in_place_leaves_inputs_and_later_batches_alone(paths, tokenizer):
    clean = list(itertools.islice(dataloader.tokenizing_data_loader(paths, tokenizer, 2, 5), 20))
    for i, (inputs, targets, _) in enumerate(
        itertools.islice(dataloader.tokenizing_data_loader(paths, tokenizer, 2, 5), 20)
    ):
        targets.fill_(-1)
        assert torch.equal(inputs, clean[i][0])


def test_the_first_batch_comes_before_the_second_file_is_read(tmp_path, paths, tokenizer):
    """600 documents stand before the broken file; the loader reads some ahead, not all."""
    write_shard(tmp_path / "a.parquet", make_texts(600), [100] * 6)
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    loader = dataloader.tokenizing_data_loader(
        [tmp_path / "a.parquet", tmp_path / "b.parquet"], tokenizer, 2, 5)
    assert next(loader)[0].shape == (2, 5)
    with pytest.raises(dataloader.UserError, match="b.parquet is not a parquet file"):
        list(loader)


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_resuming_from_any_state_continues_bit_for_bit_also_into_later_epochs(
    paths, groups, tokenizer, rank, world_size
):
    def loader(start=None):
        return dataloader.tokenizing_data_loader(
            paths, tokenizer, 3, 17, rank, world_size, start=start)

    tokens = len(plain(sum(groups[rank::world_size], []), tokenizer))
    straight = list(itertools.islice(loader(), 5 * tokens // (2 * 51)))  # two and a half epochs
    assert straight[-4][2]["epoch"] == 2
    for i in range(len(straight) - 4):
        state = json.loads(json.dumps(straight[i][2]))
        assert same(list(itertools.islice(loader(state), 4)), straight[i + 1 : i + 5]), state


def test_resuming_again_and_again_gives_every_batch_of_the_straight_run(paths, tokenizer):
    """A new loader for each batch: errors of one resume would add up."""
    loader = dataloader.tokenizing_data_loader(paths, tokenizer, 4, 9)
    straight = list(itertools.islice(loader, 60))
    state, pieces = None, []
    for _ in range(60):
        pieces.append(next(dataloader.tokenizing_data_loader(paths, tokenizer, 4, 9, start=state)))
        state = json.loads(json.dumps(pieces[-1][2]))
    assert same(pieces, straight)


def test_a_resumed_epoch_ends_where_the_straight_one_ends(paths, tokenizer):
    straight = list(dataloader.tokenizing_data_loader(paths, tokenizer, 3, 7, epochs=2))
    for i in (0, len(straight) // 2 - 1, len(straight) - 2, len(straight) - 1):
        rest = dataloader.tokenizing_data_loader(
            paths, tokenizer, 3, 7, epochs=2, start=straight[i][2])
        assert same(list(rest), straight[i + 1 :])


def test_another_batch_size_may_take_over_at_the_very_token(paths, groups, tokenizer):
    first = list(itertools.islice(dataloader.tokenizing_data_loader(paths, tokenizer, 3, 7), 10))
    then = dataloader.tokenizing_data_loader(paths, tokenizer, 2, 11, start=first[-1][2])
    tokens = stream_of(first)[:-1] + stream_of(list(itertools.islice(then, 10)))
    assert tokens == (plain(sum(groups, []), tokenizer) * 2)[: len(tokens)]


def test_states_are_not_changed_behind_the_callers_back(paths, tokenizer):
    loader = dataloader.tokenizing_data_loader(paths, tokenizer, 2, 5)
    states = [state for _, _, state in itertools.islice(loader, 10)]
    assert len({json.dumps(state) for state in states}) == 10
    kept = dict(states[3])
    list(itertools.islice(
        dataloader.tokenizing_data_loader(paths, tokenizer, 2, 5, start=states[3]), 3))
    assert states[3] == kept


# ---- memory and speed ----------------------------------------------------------------------------


def test_streaming_takes_less_than_50_mb_whatever_the_size_of_file_or_row_group(
    tmp_path, data_dir
):
    """Measured: 22 to 40 MB for 100 MB of texts, for one row group of 100 MB, for 5 MB tokenized.

    One process does all three, so the peak is the highest of them.
    """
    many = loader_bench.write_big_parquet(tmp_path / "many.parquet", 100)
    huge = loader_bench.write_big_parquet(tmp_path / "huge.parquet", 100, one_group=True)
    part = loader_bench.write_big_parquet(tmp_path / "part.parquet", 5)
    assert many.stat().st_size > 100e6 and pq.ParquetFile(huge).num_row_groups == 1
    results = loader_bench.streaming_growth(
        script_path("02_dataloader"), (many, None), (huge, None), (part, data_dir / "tokenizer"))
    assert [result["units"] > 1e6 for result in results] == [True] * 3
    assert all(result["growth_mb"] < 50 for result in results), results


def test_the_loader_keeps_up_with_raw_tiktoken(tmp_path, tokenizer):
    """On an idle machine the median is 1.0 to 1.2; other processes must not fail the suite."""
    path = loader_bench.write_big_parquet(tmp_path / "big.parquet", 8)
    best = max(loader_bench.speed_ratios(
        load("02_dataloader"), [path], tokenizer, chars=1_000_000, rounds=3)[1])
    assert best > 0.7, best


# ---- bad input -----------------------------------------------------------------------------------


def parquet_bytes(table):
    with io.BytesIO() as file:
        pq.write_table(table, file)
        return file.getvalue()


BAD_SHARDS = {
    "html": (b"<html>404</html>", "is not a parquet file"),
    "empty file": (b"", "is not a parquet file"),
    "wrong column": (parquet_bytes(pa.table({"content": ["a"]})), "only content (string)"),
    "numbers": (parquet_bytes(pa.table({"text": [1, 2]})), "only text (int64)"),
    "no rows": (parquet_bytes(pa.table({"text": pa.array([], pa.string())})), "has no rows"),
    "null": (parquet_bytes(pa.table({"text": ["a", None]})), "a text is null"),
    "cut off": (parquet_bytes(pa.table({"text": ["a" * 5000]}))[:-50], "is not a parquet file"),
    "no UTF-8": (parquet_bytes(pa.table({"text": pa.array([b"\xff"]).view(pa.string())})), "utf-8"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_a_bad_shard_is_named_with_what_is_wrong_and_what_to_do(tmp_path, tokenizer, kind):
    content, words = BAD_SHARDS[kind]
    path = tmp_path / "shard_00000.parquet"
    path.write_bytes(content)
    with pytest.raises(dataloader.UserError) as error:
        next(dataloader.tokenizing_data_loader([path], tokenizer, 1, 1))
    assert str(path) in str(error.value) and words in str(error.value), error.value
    assert "python edu/01_download.py" in str(error.value)


def test_large_strings_are_text_too(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), path)
    assert list(dataloader.parquet_texts([path])) == ["a", "b"]


def test_a_folder_with_no_or_one_shard_is_refused(tmp_path):
    for folder, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "none")):
        with pytest.raises(dataloader.UserError, match=words):
            dataloader.list_shards(folder)
    write_shard(tmp_path / "shard_00000.parquet", ["a"], [1])
    with pytest.raises(dataloader.UserError, match="the last shard is validation"):
        dataloader.list_shards(tmp_path)


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_batch_bigger_than_an_epoch_is_refused_with_both_numbers(
    paths, groups, tokenizer, epochs
):
    tokens = len(plain(sum(groups, []), tokenizer))
    fits = dataloader.tokenizing_data_loader(paths, tokenizer, 1, tokens - 1, epochs=epochs)
    assert next(fits)[0].shape == (1, tokens - 1)
    with pytest.raises(dataloader.UserError, match=f"takes {tokens + 1} tokens.*only {tokens}"):
        next(dataloader.tokenizing_data_loader(paths, tokenizer, 1, tokens, epochs=epochs))


def test_a_rank_without_a_row_group_is_told_so_instead_of_looping_for_ever(paths, tokenizer):
    with pytest.raises(dataloader.UserError, match="rank 8 of 9 has nothing to read"):
        next(dataloader.tokenizing_data_loader(paths, tokenizer, 1, 1, rank=8, world_size=9))


def test_a_state_of_other_ranks_or_other_data_is_refused(paths, tokenizer):
    good = {"epoch": 0, "doc": 0, "token": 0, "rank": 0, "world_size": 1}
    for change, words in (
        ({"world_size": 2}, "of rank 0 of 2, not 0 of 1"),
        ({"doc": 1000}, "document 1000"),
        ({"token": 100_000}, "token 100000"),
    ):
        with pytest.raises(dataloader.UserError, match=words):
            next(dataloader.tokenizing_data_loader(paths, tokenizer, 1, 1, start=good | change))
    with pytest.raises(dataloader.UserError, match="0 x 5"):
        next(dataloader.tokenizing_data_loader(paths, tokenizer, 0, 5))


# ---- the command line ----------------------------------------------------------------------------


def test_the_script_shows_shapes_shift_and_resume(run_script, data_dir):
    done = run_script("02_dataloader", "--batch-size", "2", "--seq-len", "16", data_dir=data_dir)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("02 dataloader - cpu - tokenizer ") and "B 2 x T 16" in lines[0]
    assert sum("2x16      2x16      torch.int64" in line for line in lines) == 5
    assert "resumed from the state after batch 2: batches 3 to 5 are the same bit for bit" in lines
    assert lines[-2].startswith("result: share of raw tiktoken speed - -> ")
    assert lines[-1] == "next: python edu/03_check_setup.py"


def test_the_shift_shown_is_the_real_one(paths, tokenizer, capsys):
    """Every row's target is the next row's input, in ids and in text; the seam between rows too."""
    inputs, targets, _ = next(dataloader.tokenizing_data_loader(paths, tokenizer, 2, 20))
    dataloader.print_shift(inputs, targets, tokenizer, width=6)
    rows = [line.split(None, 4) for line in capsys.readouterr().out.splitlines()[1:]]
    places = [["0", str(t)] for t in range(6)] + [["0", "19"], ["1", "0"]]
    assert [row[:2] for row in rows] == places
    for above, below in itertools.pairwise(rows[:6]):
        assert above[3] == below[2] and above[4].split(" -> ")[1] == below[4].split(" -> ")[0]
    assert rows[6][3] == rows[7][2] and rows[0][2] == str(tokenizer.get_bos_token_id())


@pytest.mark.parametrize("arguments, words", [
    (["--data-dir", "nowhere"], "nowhere"),
    (["--batch-size", "1000", "--seq-len", "1000"], "1000001 tokens"),
    (["--batch-size", "0"], "0 x 256"),
    (["--rank", "2", "--world-size", "2"], "--rank 2"),
    (["--split", "test"], "--split"),
    (["--threads", "0"], "--threads"),
])
def test_a_users_mistake_is_one_message_and_exit_code_2(data_dir, capsys, arguments, words):
    assert dataloader.main(["--data-dir", str(data_dir), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message, message


def without_tokenizer(folder, texts):
    for i in range(2):
        write_shard(folder / f"shard_{i:05d}.parquet", texts, [len(texts)])
    return ["--data-dir", str(folder), "--batch-size", "2", "--seq-len", "8"]


def test_with_no_tokenizer_and_no_network_the_message_says_how_to_train_ours(
    tmp_path, texts, monkeypatch, capsys
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no-cache"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    assert dataloader.main(without_tokenizer(tmp_path, texts)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "neither cached nor reachable" in message
    assert "no GPT-2's to stand in" in message and "python edu/11_tokenizer.py" in message


def test_with_no_tokenizer_gpt2s_stands_in_and_its_endoftext_begins_documents(
    tmp_path, texts, tokenizer, monkeypatch, capsys
):
    """tiktoken.get_encoding is replaced: the ranks are ours, special token and name GPT-2's."""
    arguments = without_tokenizer(tmp_path, texts)
    ranks = tokenizer.encoding._mergeable_ranks
    gpt2 = tiktoken.Encoding("gpt2", pat_str=bpe.split_pattern(3), mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": gpt2}.__getitem__)
    assert dataloader.main(arguments) == 0
    out = capsys.readouterr().out
    assert "GPT-2's stands in; train ours" in out and "python edu/11_tokenizer.py" in out
    assert "'<|endoftext|>' -> " in out


def test_gpt2_that_never_answers_is_given_up_after_the_stated_patience(
    tmp_path, texts, monkeypatch, capsys
):
    """tests/test_11_tokenizer.py has the same with a real silent server and a real process."""
    released = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: released.wait(60))
    arguments = without_tokenizer(tmp_path, texts)
    assert dataloader.main([*arguments, "--gpt2-patience", "0.2"]) == 2
    released.set()
    assert "no answer within 0.2 s" in capsys.readouterr().err
