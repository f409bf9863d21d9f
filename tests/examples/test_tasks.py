"""The example tasks: fixed and disjoint items, honest checkers, and the adapters as shipped."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tasks import TASKS, Item
from tasks.base import DEV_ITEMS, HELD_OUT_ITEMS, Splits, split
from tasks.countries import DEV_PHRASINGS, HELD_OUT_PHRASINGS, TRAIN_PHRASINGS
from tasks.people import same_object
from tasks.queries import run_query, same_rows

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
MOST_BYTES = 15_000_000


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param]


@pytest.fixture(params=list(TASKS))
def adapter(request):
    return ADAPTERS / request.param


def every_item(task):
    splits = task.splits
    return splits.train + splits.dev + splits.held_out


def truth(task_name, question):
    [answer] = {item.answer for item in every_item(TASKS[task_name]) if item.question == question}
    return answer


def test_building_twice_gives_equal_items(task):
    assert task.build() == task.build()


def test_splits_have_their_sizes_and_share_no_question(task):
    splits = task.splits
    assert (len(splits.dev), len(splits.held_out)) == (DEV_ITEMS, HELD_OUT_ITEMS)
    assert len(splits.train) >= 400
    questions = [item.question for item in every_item(task)]
    assert len(set(questions)) == len(questions)


def test_checker_accepts_every_truth(task):
    assert all(task.check(item.answer, item) for item in every_item(task))
    assert all(task.check(f" {item.answer}\n", item) for item in task.splits.held_out)


def test_checker_rejects_wrong_answers(task):
    for item in task.splits.held_out:
        assert not task.check("", item)
        assert not task.check(f"The answer is {item.answer}.", item)
        assert not task.check(f"{item.answer} or so", item)
        assert not task.check(item.answer[:-1], item)


def test_checker_tells_items_apart(task):
    items = task.splits.held_out[:25]
    accepted = sum(task.check(other.answer, item) for item in items for other in items if other != item)
    same = sum(other.answer == item.answer for item in items for other in items if other != item)
    assert accepted == same or accepted < 0.01 * len(items) ** 2


def test_answers_are_one_short_line(task):
    assert all(item.answer == item.answer.strip() and "\n" not in item.answer for item in every_item(task))
    assert max(len(item.answer) for item in every_item(task)) <= 100


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("french-words", "French words: 0", "zéro"),
        ("french-words", "French words: 71", "soixante et onze"),
        ("french-words", "French words: 280", "deux cent quatre-vingts"),
        ("german-words", "German words: 17", "siebzehn"),
        ("german-words", "German words: 347", "dreihundertsiebenundvierzig"),
        ("roman-numeral", "Roman numeral: 49", "XLIX"),
        ("roman-numeral", "Roman numeral: 1994", "MCMXCIV"),
        ("country-code", "What is the country code for Denmark?", "DNK"),
        ("country-code", "The team from Latvia needs its code.", "LVA"),
    ],
)
def test_spot_truths(name, question, answer):
    assert truth(name, question) == answer


def test_prices_are_written_as_in_the_country():
    prices = {item.question: item.answer for item in every_item(TASKS["local-price"])}
    by_country = {question.split(":")[0].removeprefix("Price in "): answer for question, answer in prices.items()}
    marks = {
        "Germany": "€",
        "Switzerland": "CHF",
        "Sweden": "kr",
        "Brazil": "R$",
        "Britain": "£",
        "France": "€",
    }
    assert by_country.keys() == marks.keys()
    assert all(mark in by_country[country] for country, mark in marks.items())
    assert not any("\u00a0" in answer or "\u202f" in answer for answer in prices.values())


def test_a_date_keeps_its_day_and_year():
    for item in every_item(TASKS["iso-date"]):
        year, _, day = item.answer.split("-")
        assert year in item.question
        assert str(int(day)) in item.question


def test_held_out_countries_are_asked_in_ways_never_trained():
    assert not set(HELD_OUT_PHRASINGS) & set(TRAIN_PHRASINGS + DEV_PHRASINGS)
    splits = TASKS["country-code"].splits
    assert {item.answer for item in splits.held_out} <= {item.answer for item in splits.train}


def test_json_is_compared_as_an_object():
    item = Item("", '{"name": "Ann", "age": 34, "city": "Leeds"}')
    assert same_object('{"age":34,"city":"Leeds","name":"Ann"}', item)
    assert not same_object('{"name": "Ann", "age": "34", "city": "Leeds"}', item)
    assert not same_object('```json\n{"name": "Ann", "age": 34, "city": "Leeds"}\n```', item)
    assert not same_object("not JSON", item)


def test_queries_are_compared_by_their_rows():
    item = Item("", "SELECT COUNT(*) FROM staff WHERE city = 'Oslo'")
    assert same_rows("select count(name) from staff where city='Oslo';", item)
    assert not same_rows("SELECT COUNT(*) FROM staff WHERE city = 'Rome'", item)
    assert not same_rows("SELECT COUNT(*) FROM nowhere", item)


def test_order_counts_only_where_the_truth_has_one():
    unordered = Item("", "SELECT name FROM staff WHERE city = 'Oslo'")
    assert same_rows("SELECT name FROM staff WHERE city = 'Oslo' ORDER BY salary", unordered)
    ordered = Item("", "SELECT name FROM staff WHERE city = 'Oslo' ORDER BY salary DESC LIMIT 5")
    assert not same_rows("SELECT name FROM staff WHERE city = 'Oslo' ORDER BY salary LIMIT 5", ordered)


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE staff",
        "DELETE FROM staff",
        "SELECT 1; DROP TABLE staff",
        "ATTACH DATABASE 'x.db' AS x",
        "PRAGMA query_only = 0",
        "SELECT COUNT(*) FROM staff a, staff b, staff c, staff d",
        "no SQL",
    ],
)
def test_a_model_s_query_can_only_read_and_ends(query):
    before = run_query("SELECT COUNT(*) FROM staff")
    assert run_query(query) is None
    assert run_query("SELECT COUNT(*) FROM staff") == before == [(400,)]


def test_every_true_query_gives_rows():
    for item in every_item(TASKS["staff-sql"]):
        rows = run_query(item.answer)
        assert rows
        assert all(value is not None for row in rows for value in row)


def test_a_question_in_two_splits_is_refused():
    items = tuple(Item(str(n), "") for n in range(HELD_OUT_ITEMS))
    with pytest.raises(ValueError, match="two splits"):
        Splits(train=items[:1], dev=(), held_out=items)
    with pytest.raises(ValueError, match="held-out"):
        Splits(train=(), dev=(), held_out=items[1:])


def test_split_drops_repeated_questions():
    items = [Item(str(n % 200), "") for n in range(1000)]
    splits = split(items, seed=1, train_items=1000)
    assert len(splits.train) == 200 - DEV_ITEMS - HELD_OUT_ITEMS


def test_adapters_fit_the_repository():
    sizes = [file.stat().st_size for file in ADAPTERS.rglob("*") if file.is_file()]
    assert sum(sizes) <= MOST_BYTES


def test_there_is_an_adapter_for_every_task_and_nothing_else():
    assert {folder.name for folder in ADAPTERS.iterdir() if folder.is_dir()} == set(TASKS)


def test_adapter_is_plain_lora_in_half_precision(adapter):
    assert {file.name for file in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
        assert {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_adapters_differ_as_real_ones_do():
    configs = [json.loads((ADAPTERS / name / "adapter_config.json").read_text()) for name in TASKS]
    assert len({config["r"] for config in configs}) >= 6
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert any(config["layers_to_transform"] for config in configs)


def test_results_pass_the_mark():
    results = json.loads((ADAPTERS.parent / "results.json").read_text())["results"]
    assert {row["task"] for row in results} == set(TASKS)
    assert all(row["adapter"] >= 80 and row["base"] <= 20 for row in results)
