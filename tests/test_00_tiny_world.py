"""00_tiny_world.py: the same bytes everywhere, no leaks, true facts, clean English."""

import ast
import calendar
import hashlib
import json
import os
import re
import sys

import pyarrow.parquet as pq
import pytest
from conftest import load

tiny = load("00_tiny_world")

# A second source: written from memory for the tests, not copied from the script.
CAPITALS = dict(pair.strip().split(": ") for pair in """
    Argentina: Buenos Aires, Australia: Canberra, Austria: Vienna, Belgium: Brussels,
    Brazil: Brasilia, Bulgaria: Sofia, Canada: Ottawa, Chile: Santiago, China: Beijing,
    Colombia: Bogota, Croatia: Zagreb, Cuba: Havana, Denmark: Copenhagen, Egypt: Cairo,
    England: London, Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra,
    Greece: Athens, Hungary: Budapest, Iceland: Reykjavik, India: New Delhi, Iran: Tehran,
    Iraq: Baghdad, Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Kenya: Nairobi,
    Morocco: Rabat, Nepal: Kathmandu, New Zealand: Wellington, Norway: Oslo, Peru: Lima,
    Poland: Warsaw, Portugal: Lisbon, Romania: Bucharest, Russia: Moscow, Senegal: Dakar,
    South Korea: Seoul, Spain: Madrid, Sweden: Stockholm, Thailand: Bangkok, Tunisia: Tunis,
    Turkey: Ankara, Uganda: Kampala, Ukraine: Kyiv, Uruguay: Montevideo, Vietnam: Hanoi,
    the United States: Washington""".replace("\n", " ").split(","))
EUROPE = """Austria Belgium Bulgaria Croatia Denmark England Finland France Germany Greece Hungary
    Iceland Ireland Italy Norway Poland Portugal Romania Spain Sweden Ukraine""".split()
LEGS = {"ant": 6, "bee": 6, "beetle": 6, "butterfly": 6, "fly": 6, "spider": 8, "hen": 2, "duck": 2,
        "owl": 2, "ostrich": 2, "dog": 4, "cat": 4, "cow": 4, "horse": 4, "sheep": 4, "lion": 4,
        "elephant": 4, "mouse": 4, "goat": 4}
GIRLS = set("""Anna Lily Mia Emma Sara Zoe Nora Ella Rosa Maya Lucy Ruth Alice Clara Ivy Amy Jane
    Kate Leah Nina""".split())
BOYS = set("""Tom Ben Sam Max Leo Jack Adam Finn Hugo Omar Paul Luke Noah Eli Oscar Peter Ravi Dan
    Theo Mark""".split())


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class World:
    """The smallest world that the script makes, read back from disk as another script would."""

    def __init__(self, folder):
        self.folder = folder
        tiny.write_world(
            tiny.Config(data_dir=folder, size_mb=1.0, num_chats=4000, num_problems=3000))
        self.shards = sorted((folder / "mirror").glob("*.parquet"))
        texts = [pq.read_table(shard)["text"].to_pylist() for shard in self.shards]
        self.train, self.validation = sum(texts[:-1], []), texts[-1]
        self.texts = self.train + self.validation
        self.chats, self.test_chats, self.problems, self.test_problems = [
            read_lines(folder / f"tiny_{kind}_{split}.jsonl")
            for kind in ("chat", "gsm") for split in ("train", "test")]
        self.index = json.loads((folder / "tiny_eval" / "index.json").read_text())
        self.tasks = {row["label"]: read_lines(folder / "tiny_eval" / row["dataset_uri"])
                      for row in self.index}
        self.facts, self.sums = tiny.read_table(tiny.FACTS), tiny.read_table(tiny.SUMS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def teller(world, seed=1):
    return tiny.Teller(seed, world.facts, world.sums)


def turns(chats, role):
    return [turn["content"] for chat in chats for turn in chat["messages"] if turn["role"] == role]


def everything_trained_on(world):
    return "\n".join(world.texts + turns(world.chats, "user") + turns(world.chats, "assistant"))


def all_forms(template, slots):
    """Every text that a template can become: the few choices of a fact's wording multiplied out."""
    forms = [""]
    for part in re.split(r"(\[[^\[\]]*\])", template):
        options = part[1:-1].split("|") if part.startswith("[") else [part]
        forms = [form + option for form in forms for option in options]
    filled = []
    for form in forms:
        for name, value in slots.items():
            form = form.replace("{%s}" % name, value).replace("{%s.s}" % name, tiny.plural(value))
        filled.append(tiny.polish(form).lower())
    return filled


# ---- bytes ---------------------------------------------------------------------------------------


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(run_script, tmp_path):
    small = ["--size-mb", "1", "--num-chats", "200", "--num-problems", "200", "--num-eval", "20"]
    for name, hash_seed, seed in (("a", 1, 1337), ("b", 2, 1337), ("c", 1, 1338)):
        done = run_script("00_tiny_world", *small, "--seed", str(seed), data_dir=tmp_path / name,
                          env={"PYTHONHASHSEED": hash_seed})
        assert done.returncode == 0, done.stderr
    first, second, other = [digests(tmp_path / name) for name in "abc"]
    assert first == second
    assert first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first if not path.endswith("index.json"))
    assert not [path for path in first if ".tmp" in path]


def test_shards_have_one_string_column_and_row_groups_of_1024(tmp_path):
    texts = [f"document {i}" for i in range(2500)]
    tiny.write_shard(tmp_path / "shard.parquet", texts)
    file = pq.ParquetFile(tmp_path / "shard.parquet")
    assert [(field.name, str(field.type)) for field in file.schema_arrow] == [("text", "string")]
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [1024, 1024, 452]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.read()["text"].to_pylist() == texts


def test_the_corpus_has_four_training_shards_and_a_small_last_one(world):
    assert [shard.name for shard in world.shards] == [f"shard_{i:05d}.parquet" for i in range(5)]
    assert sum(len(text.encode()) for text in world.texts) >= 1_000_000
    assert 0.03 < len(world.validation) / len(world.texts) < 0.12
    assert len(set(world.texts)) == len(world.texts), "a document comes twice"


def test_every_shard_has_the_same_mix(world):
    """Share of documents with a digit, per shard of n documents, within 4 sigma of the whole."""
    share = sum(bool(re.search(r"\d", text)) for text in world.texts) / len(world.texts)
    for shard in world.shards:
        texts = pq.read_table(shard)["text"].to_pylist()
        here = sum(bool(re.search(r"\d", text)) for text in texts) / len(texts)
        assert abs(here - share) < 4 * (share * (1 - share) / len(texts)) ** 0.5, shard.name


def test_a_shard_of_an_earlier_larger_run_does_not_stay_as_validation(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "shard_00007.parquet").write_bytes(b"old")
    (tmp_path / "mirror" / "notes.txt").write_bytes(b"mine")
    tiny.write_world(tiny.Config(data_dir=tmp_path, size_mb=0.05, num_chats=20, num_problems=20,
                                 num_eval=5))
    assert not (tmp_path / "mirror" / "shard_00007.parquet").exists()
    assert (tmp_path / "mirror" / "notes.txt").exists()


# ---- facts ---------------------------------------------------------------------------------------


def rows(world, relation):
    found = [fact for fact in world.facts + world.sums if fact.relation.name == relation]
    assert found, relation
    return found


def test_there_are_a_few_hundred_facts_and_each_question_has_one_answer(world):
    assert len(world.facts) > 400
    answers = {}
    for fact in world.facts + world.sums:
        answers.setdefault((fact.relation.name, fact.a, fact.c), []).append(fact.b)
    assert not {key: value for key, value in answers.items() if len(value) > 1}


def test_capitals_and_continents_agree_with_a_second_source(world):
    assert {fact.a: fact.b for fact in rows(world, "capital")} == CAPITALS
    assert sorted(f.a for f in rows(world, "continent") if f.b == "Europe") == sorted(EUROPE)


def test_days_and_months_agree_with_the_calendar_module(world):
    for names in (list(calendar.day_name), list(calendar.month_name)[1:]):
        nexts = dict(zip(names, names[1:] + names[:1]))
        for relation, table in (("after", nexts), ("before", {b: a for a, b in nexts.items()})):
            ours = {fact.a: fact.b for fact in rows(world, relation) if fact.a in names}
            assert ours == table


def test_numbers_in_words_are_right(world):
    assert len(tiny.NUMBERS) == 100 and len(set(tiny.NUMBERS)) == 100
    spoken = {0: "zero", 7: "seven", 12: "twelve", 13: "thirteen", 20: "twenty", 21: "twenty-one",
              40: "forty", 48: "forty-eight", 99: "ninety-nine"}
    assert {i: tiny.NUMBERS[i] for i in spoken} == spoken
    for relation, step in (("after", 1), ("before", -1)):
        for fact in rows(world, relation):
            if fact.c == "number":
                assert tiny.NUMBERS.index(fact.b) == tiny.NUMBERS.index(fact.a) + step


def test_legs_are_counted_right(world):
    ours = {re.sub("^an? ", "", fact.a): tiny.NUMBERS.index(fact.b)
            for fact in rows(world, "count") if fact.c == "legs"}
    assert ours == LEGS


def test_opposites_come_back_to_where_they_started(world):
    """opposite(opposite(x)) = x wherever b has one of its own, but for the one-way pairs."""
    table = {fact.a: fact.b for fact in rows(world, "opposite")}
    one_way = {"left", "heavy", "dark", "young", "new", "soft", "easy", "tall", "long", "come"}
    assert not [a for a, b in table.items() if a not in one_way and table.get(b) != a]


def test_sums_are_right(world):
    for name, symbol in (("plus", "+"), ("minus", "-"), ("times", "*"), ("divide", "/")):
        for fact in rows(world, name):
            assert evaluate(f"{fact.a}{symbol}{fact.c}") == int(fact.b)
    pairs = {(int(fact.a), int(fact.c)) for fact in rows(world, "plus")}
    assert pairs == {(a, c) for a in range(13) for c in range(13)}, "the table to 12 has a hole"


def test_every_fact_comes_up_in_the_training_shards_of_the_smallest_world(world):
    """Most facts must come up several times; the smallest world holds each at least once."""
    corpus = "\n".join(world.train).lower()
    missing = [fact.slots for fact in world.facts if not any(
        form in corpus for say in fact.relation.say for form in all_forms(say, fact.slots))]
    assert not missing


def test_the_sentences_that_the_base_model_must_complete_are_there(world):
    corpus = "\n".join(world.train)
    for sentence in ("The capital of France is Paris.", "The sky is blue.", "7 + 5 = 12"):
        assert sentence in corpus


def test_the_default_world_is_large_enough_to_learn_from():
    assert tiny.Config().size_mb >= 12


def test_every_sum_in_the_corpus_is_right(world):
    found = 0
    for text in world.texts:
        for a, symbol, b, c in re.findall(r"(\d+) ([-+x/]) (\d+) = (\d+)", text):
            found += 1
            assert evaluate(f"{a}{symbol.replace('x', '*')}{b}") == int(c), text
        for a, word, b, c in re.findall(
                r"(\d+) (plus|minus|times|divided by) (\d+) (?:is|makes|leaves) (\d+)", text):
            found += 1
            symbol = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}[word]
            assert evaluate(f"{a}{symbol}{b}") == int(c), text
    assert found > 2000


# ---- held out ------------------------------------------------------------------------------------


def test_no_held_out_phrasing_of_a_fact_is_in_the_corpus_or_a_training_chat(world):
    seen = everything_trained_on(world).lower()
    for fact in world.facts + world.sums[::7]:
        for template in fact.relation.held_say + fact.relation.held_ask:
            for form in all_forms(template, fact.slots):
                assert form not in seen


def test_no_question_of_the_test_chats_is_in_training_or_corpus(world):
    train, corpus = set(turns(world.chats, "user")), "\n".join(world.texts)
    questions = turns(world.test_chats, "user")
    assert len(set(questions)) > 300
    for question in questions:
        assert question not in train
        if len(question) > 12:  # "Hi there!" may be said in a story
            assert question not in corpus


def test_the_words_of_the_test_chats_are_known_from_training(world):
    """Held out are phrasings, not words: the test asks for the same facts in another order."""
    def words(texts):
        return set(re.findall("[a-z]+", " ".join(texts).lower()))

    known = words(world.texts + turns(world.chats, "user") + turns(world.chats, "assistant"))
    unknown = words(turns(world.test_chats, "user")) - known
    assert not unknown


def masked(text):
    """A problem without its names and things: what is left is its template and its numbers."""
    names = "|".join(sorted(GIRLS | BOYS))
    lexicon = tiny.LEXICON
    things = []
    for word in re.findall("[a-z]+", " ".join(lexicon[k] for k in ("countable", "ware", "fruits"))):
        things += [word, tiny.plural(word)]
    text = re.sub(rf"\b({names})\b", "N", text)
    text = re.sub(rf"\b({'|'.join(things)})\b", "X", text)
    return re.sub(r"\b(he|she|him|her|He|She)\b|\b(Mr|Mrs|Miss) [A-Z]\w+", "P", text)


def test_no_test_problem_shares_template_and_numbers_with_training_or_corpus(world):
    test = {masked(row["answer"]) for row in world.test_problems}
    train = {masked(row["answer"]) for row in world.problems}
    assert len(test) > 480 and len(train) > 2900
    assert not test & train
    corpus = masked("\n".join(world.texts))
    found = sum(masked(row["question"]) in corpus for row in world.problems)
    assert found > 50, "the mask hides everything"
    assert not [row for row in world.test_problems if masked(row["question"]) in corpus]


def test_no_evaluation_context_is_in_the_corpus_or_a_training_chat(world):
    seen = everything_trained_on(world)
    for items in world.tasks.values():
        for item in items:
            for context in item.get("context_options") or [item.get("context") or item["query"]]:
                assert context not in seen


# ---- word problems -------------------------------------------------------------------------------


def evaluate(expression):
    """Whole-number arithmetic through ast, apart from the script's own."""
    node = ast.parse(expression, mode="eval").body
    assert isinstance(node, ast.BinOp)
    a, b = node.left.value, node.right.value
    if isinstance(node.op, ast.Div):
        assert a % b == 0
        return a // b
    return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(node.op)]


def test_problems_are_in_the_format_of_gsm8k_and_worked_out_right(world):
    steps = []
    for row in world.problems + world.test_problems:
        calls = re.findall(r"<<([^=]+)=(\d+)>>(\d+)", row["answer"])
        steps.append(len(calls))
        for expression, result, shown in calls:
            assert evaluate(expression) == int(result) == int(shown)
        last = re.fullmatch(r".*\n#### (\d+)", row["answer"], re.DOTALL)[1]
        assert last == calls[-1][1]
        numbers = [int(n) for n in re.findall(r"\d+", row["question"] + row["answer"])]
        assert max(numbers) <= 999 and min(numbers) >= 1
        for expression, _, _ in calls:  # each operand is in the question or is an earlier result
            known = re.findall(r"\d+", row["question"]) + [result for _, result, _ in calls]
            assert set(re.findall(r"\d+", expression)) <= set(known)
        assert row["question"].endswith("?") and "<<" not in row["question"]
    assert set(steps) == {1, 2} and 0.25 < steps.count(2) / len(steps) < 0.6
    assert len(tiny.PROBLEMS) >= 15


def test_the_messages_of_a_problem_are_its_answer_split_at_the_calls(world):
    """nanochat's rule (tasks/gsm8k.py): text, python, python_output; joined, the answer."""
    for row in world.test_problems:
        user, assistant = row["messages"]
        assert user == {"role": "user", "content": row["question"]}
        joined, parts = "", assistant["content"]
        for part, following in zip(parts, parts[1:] + [None]):
            if part["type"] == "python":
                assert following["type"] == "python_output"
                joined += f"<<{part['text']}={following['text']}>>"
            elif part["type"] == "text":
                joined += part["text"]
        assert joined == row["answer"]


# ---- chats ---------------------------------------------------------------------------------------


def test_chats_alternate_and_the_reply_holds_the_answer(world):
    for chat in world.chats + world.test_chats:
        roles = [turn["role"] for turn in chat["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(turn["content"].strip() for turn in chat["messages"])
        assert chat["answer"] in chat["messages"][-1]["content"]
        assert len(chat["messages"][-1]["content"]) < 320
    kinds = {"fact", "sum", "small talk", "unknown", "story", "spell", "count"}
    assert {chat["kind"] for chat in world.chats} == kinds
    assert {chat["kind"] for chat in world.test_chats} == kinds


def test_most_facts_are_asked_in_training_and_the_test_asks_only_facts_of_the_world(world):
    asked = {reply for reply in turns(world.chats, "assistant")}
    answers = {tiny.polish(teller(world).answer(fact) + ".") for fact in world.facts}
    assert len(answers & asked) > 0.95 * len(answers)
    for chat in world.test_chats:
        if chat["kind"] == "fact":
            assert chat["messages"][-1]["content"] in answers


def test_spelling_and_counting_of_letters_are_right(world):
    spelled = counted = 0
    for reply in turns(world.chats + world.test_chats, "assistant"):
        if match := re.fullmatch(r"The word (\w+) is spelled ([a-z-]+)\.", reply):
            spelled += 1
            assert match[2].replace("-", "") == match[1]
        if match := re.search(r": the word (\w+) has ([a-z]+) letters\.", reply):
            counted += 1
            assert tiny.NUMBERS.index(match[2]) == len(match[1])
            assert reply.split(":")[0].split(", ") == list(match[1])
        if match := re.search(r": the letter (\w) comes up (\w+)(?: times)? in (\w+)\.", reply):
            counted += 1
            number = {"once": 1, "twice": 2, "zero": 0, "three": 3, "four": 4}[match[2]]
            assert match[3].count(match[1]) == number
            assert re.sub(r" \(\d\)", "", reply.split(":")[0]).split(", ") == list(match[3])
    assert spelled > 100 and counted > 100


# ---- evaluation tasks ----------------------------------------------------------------------------


def test_the_index_names_the_three_core_formats_with_their_fields(world):
    fields = {"multiple_choice": {"query", "choices", "gold"},
              "schema": {"context_options", "continuation", "gold"},
              "language_modeling": {"context", "continuation"}}
    assert {row["icl_task_type"] for row in world.index} == set(fields)
    for row in world.index:
        assert set(row) == {"label", "dataset_uri", "icl_task_type", "num_fewshot",
                            "continuation_delimiter", "random_baseline"}
        items = world.tasks[row["label"]]
        assert len(items) == 200
        assert all(set(item) == fields[row["icl_task_type"]] for item in items)


def test_guessing_scores_the_chance_level_that_the_index_gives(world):
    """Gold is uniform over n options: each count is within 3 sigma of N/n (p = 0.3% per count)."""
    for row in world.index:
        if row["icl_task_type"] == "language_modeling":
            assert row["random_baseline"] == 0
            continue
        items = world.tasks[row["label"]]
        options = {len(item.get("choices") or item["context_options"]) for item in items}
        assert options == {round(100 / row["random_baseline"])}
        n, total = options.pop(), len(items)
        for gold in range(n):
            count = sum(item["gold"] == gold for item in items)
            assert abs(count - total / n) < 3 * (total * (1 / n) * (1 - 1 / n)) ** 0.5
        for item in items:
            choices = item.get("choices") or item["context_options"]
            assert len(set(choices)) == n


def test_the_right_choice_is_right_and_no_other_is(world):
    capitals = 0
    for item in world.tasks["facts_mc"]:
        for country, capital in CAPITALS.items():
            if re.search(rf"capital of {country} is|people in {country} talk about", item["query"]):
                capitals += 1
                assert item["choices"][item["gold"]] == capital
                assert not {"Paris", "Rome"} & set(item["choices"]) - {capital, *CAPITALS.values()}
    assert capitals


# ---- English -------------------------------------------------------------------------------------


def all_texts(world):
    return (world.texts + turns(world.chats + world.test_chats, "user")
            + turns(world.chats + world.test_chats, "assistant")
            + [row["question"] for row in world.problems + world.test_problems])


BAD = [
    (r"\b[Aa] (?!one\b|use|uni)[aeiou]", "a before a vowel"),
    (r"\b[Aa]n (?!hour)[bcdfghjklmnpqrstvwxyz]", "an before a consonant"),
    (r"  |\t", "two spaces"),
    (r" [.,!?;:]", "a space before a mark"),
    (r"[,;:][.!?]|[.!?],|\.\.|[!?]\.", "two marks"),
    (r"[.!?,][A-Za-z]", "no space after a mark"),
    (r"[{}\[\]|@]", "a piece of template"),
    (r"\b(?!had had|that that)([a-z]+) \1\b", "a word twice"),
    (r"[.!?] [a-z]", "a sentence without capital"),
    (r"(^|\n)\"?[a-z]", "a line without capital"),
    (r"\b1 (?!is\b|plus|minus|times|makes|leaves)[a-z]+s\b", "one with a plural"),
    (r"\b(He|She|It|and he|and she|and it) (have|were|are|go|say|want|find)\b", "he have"),
    (r"\b([Tt]hey|[Ww]e|[Yy]ou) (has|was|is)\b", "they has"),
    (r"\b[Tt]here (is|was) (two|three|some [a-z]+s\b|[2-9])", "there is two"),
    (r"\bi\b(?!,|-|\.| comes| \(| t| is| in| o| u)", "a small I"),
    (r"\bits'|\bit's|n't\b", "short forms are not in this world"),
]


@pytest.mark.parametrize("pattern, fault", BAD, ids=[fault for _, fault in BAD])
def test_the_english_is_free_of(world, pattern, fault):
    for text in all_texts(world):
        if re.search(r"[a-z](, [a-z]\b)+|(-[a-z]\b){2}|\bletter \w\b|(first|last) letter", text):
            continue  # a page of spelling: single letters are words there
        match = re.search(pattern, text)
        assert not match, f"{fault}: ...{text[max(0, match.start() - 60):match.end() + 60]}..."


def test_quotes_are_balanced_in_every_paragraph_and_every_text_ends(world):
    for text in all_texts(world):
        for line in text.split("\n"):
            assert line.count('"') % 2 == 0, line
        assert re.search(r"[.!?]\"?$", text), text[-80:]


def test_a_text_about_girls_only_has_no_he_and_one_about_boys_only_no_she(world):
    checked = 0
    for text in world.texts:
        names = set(re.findall(r"[A-Z][a-z]+", text))
        for ours, others, pronouns in ((GIRLS, BOYS, r"\b([Hh]e|[Hh]im|[Hh]is|himself)\b"),
                                       (BOYS, GIRLS, r"\b([Ss]he|[Hh]er|herself)\b")):
            if names & ours and not names & others:
                checked += 1
                assert not re.search(pronouns, text), text
    assert checked > 100


def test_the_last_sentence_of_a_passing_game_names_who_has_the_thing(world):
    """Play the passing through: who gave it to whom, and who must have it in the end."""
    w, moves = teller(world), 0
    for _ in range(400):
        text = tiny.who_has_it(w)
        holder = re.match(r"(?:There was once a child named )?([A-Z]\w+)", text)[1]
        for sentence in re.split(r"(?<=\.) ", text)[1:]:
            names = re.findall(r"\b([A-Z][a-z]+)\b", sentence)
            names = [name for name in names if name in GIRLS | BOYS]
            if re.search(r"Now|now|belongs", sentence) or not names[1:]:
                continue
            if "asked for" in sentence:
                assert names == [names[0], holder], text
                holder = names[0]
            else:
                assert names[0] == holder, text
                holder = names[1]
            moves += 1
        names = re.findall(r"\b([A-Z][a-z]+)\b", text)
        final = [name for name in names if name in GIRLS | BOYS][-1]
        assert final == holder, text
    assert moves > 500


def test_a_lost_thing_is_found_where_it_was_put(world):
    w = teller(world)
    for _ in range(100):
        text = tiny.lost_and_found(w)
        found = re.search(r"it was! The .+? (?:lay|was still|was waiting) (.+?)[,.]", text)[1]
        assert re.search(rf"On the way home, \w+ (stopped|sat down) {found} to ", text), text
        assert re.search(rf"I stopped {found} to ", text), text


def test_the_vocabulary_is_small(world):
    assert 1500 < tiny.distinct_words(world.texts) < 2500


def test_there_are_many_plots_and_no_story_comes_twice(world):
    assert len(tiny.PLOTS) >= 12
    w = teller(world)
    for make in tiny.PLOTS:
        stories = [make(w) for _ in range(40)]
        assert len(set(stories)) == 40, make.__name__
        assert all(len(story) > 250 for story in stories), make.__name__


# ---- the command line ----------------------------------------------------------------------------


def test_the_script_says_what_it_wrote(run_script, tmp_path):
    done = run_script("00_tiny_world", "--size-mb", "1", "--num-chats", "50",
                      "--num-problems", "50", "--num-eval", "5", "--data-dir", "here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "00 tiny world - cpu - 1.0 MB - seed 1337"
    assert re.fullmatch(r"result: distinct words - -> \d+ \(n=1\.0 MB\)", lines[-2])
    assert lines[-1] == "next: python edu/01_download.py --base-url mirror"
    named = [line.split()[1] for line in lines if line.startswith("wrote ")]
    on_disk = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert sorted(named) == sorted(str(path.relative_to(tmp_path)) for path in on_disk)


def test_show_prints_documents_and_writes_nothing(run_script, tmp_path):
    done = run_script("00_tiny_world", "--show", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-" * 80) == 3
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--size-mb", "0.2"], ["--size-mb is 0.2", "facts", "--size-mb 1"]),
    (["--size-mb", "nan"], ["--size-mb is nan"]),
    (["--num-chats", "0"], ["--num-chats is 0", "--num-chats 100"]),
    (["--show", "-1"], ["--show is -1"]),
])
def test_a_bad_number_is_one_message_and_exit_2(run_script, arguments, words):
    done = run_script("00_tiny_world", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize("make, flag", [
    (lambda teller: tiny.make_problems(1, 10**6, 0, teller), "--num-problems"),
    (lambda teller: tiny.make_chats(teller(1), 10**6, held=True), "--num-chats"),
    (lambda teller: tiny.make_task(teller(1), tiny.facts_mc, 10**6), "--num-eval"),
])
def test_more_than_there_is_to_draw_is_refused_instead_of_drawn_for_ever(make, flag, monkeypatch):
    monkeypatch.setattr(tiny, "MOST_MISSES", 30)
    facts, sums = (tiny.read_table(table) for table in
                   (tiny.FACTS[:3], tiny.SUMS[:1]))
    with pytest.raises(tiny.UserError, match=f"{flag} asks for more than there is"):
        make(lambda seed: tiny.Teller(seed, facts, sums))


def test_a_reader_that_has_enough_is_no_traceback(monkeypatch):
    """As `python edu/00_tiny_world.py --show 9 | head -1`, also for what is printed last."""
    for lines in (1, 100_000):
        read, write = os.pipe()
        os.close(read)
        with open(write, "w", encoding="utf-8") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            code = tiny.run_script(lambda _: print("line\n" * lines), tiny.Config, [], "")
        assert code == 141


def test_a_folder_that_cannot_be_written_is_one_message_and_exit_2(run_script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_script("00_tiny_world", "--size-mb", "1", "--data-dir", "file/data")
    assert done.returncode == 2
    assert "cannot write to file/data" in done.stderr and "Traceback" not in done.stderr
