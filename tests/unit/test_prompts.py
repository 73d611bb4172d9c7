import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tpaw_ray.config import ModelConfig, resolve_config
from tpaw_ray.data.prompts import PromptCounts, iter_prompts, prepare_prompts, prompt_id, split_of, survey_prompts
from tpaw_ray.data.rows import Conversation, Message
from tpaw_ray.data.template import end_tokens, load_tokenizer, render, render_all
from tpaw_ray.errors import CheckpointError, ConfigError, DataError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def bos_tokenizer():
    """Adds `<s>` to every text on its own account, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def said(prompt="1+1?", target="2", row=0, system=None):
    turns = [Message(role="system", content=system)] if system else []
    return Conversation(row=row, prompt=(*turns, Message(role="user", content=prompt)), target=target)


def rendered(tokenizer, conversation):
    prompt, target = render(tokenizer, conversation, [tokenizer.eos_token_id], "data.jsonl")
    return tokenizer.decode(prompt), tokenizer.decode(target)


# Rendering.


def test_prompt_opens_the_assistant_turn_and_target_ends_with_its_end_token(tokenizer):
    assert rendered(tokenizer, said(system="Add.")) == ("<|system|>Add.<|end|><|user|>1+1?<|end|><|assistant|>", "2<|end|>")


def test_what_the_template_puts_behind_the_end_token_is_cut(tokenizer):
    tokenizer.chat_template = CHATML
    assert rendered(tokenizer, said(target="2\n3")) == ("<|user|>1+1?<|end|>\n<|assistant|>", "2\n3<|end|>")


def test_a_template_without_an_end_token_gets_one(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("+ '<|end|>'", "+ '#'")
    assert rendered(tokenizer, said()) == ("<|user|>1+1?#<|assistant|>", "2#<|end|>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML])
def test_every_target_ends_with_exactly_one_end_token(tokenizer, template):
    tokenizer.chat_template = template
    for text in ("2", "2\n", " 2 ", "a\n\nb", "#### 72"):
        _, target = render(tokenizer, said(target=text), [tokenizer.eos_token_id])
        assert target[-1] == tokenizer.eos_token_id
        assert target.count(tokenizer.eos_token_id) == 1


def test_any_of_the_end_tokens_ends_a_target(tokenizer):
    other = tokenizer.convert_tokens_to_ids("<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|end|>'", "'<unk>' + '<|end|>'")
    _, target = render(tokenizer, said(), sorted([other, tokenizer.eos_token_id]))
    assert target == [*tokenizer("2")["input_ids"], other]


def test_bos_is_not_doubled(bos_tokenizer):
    bos_tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    prompt, target = render(bos_tokenizer, said(), [bos_tokenizer.eos_token_id])
    assert prompt[0] == bos_tokenizer.bos_token_id
    assert [*prompt, *target].count(bos_tokenizer.bos_token_id) == 1


def test_bos_is_not_added_to_a_template_without_one(bos_tokenizer):
    prompt, target = render(bos_tokenizer, said(), [bos_tokenizer.eos_token_id])
    assert bos_tokenizer.bos_token_id not in [*prompt, *target]


def test_a_template_that_does_not_keep_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>think' }}")
    with pytest.raises(
        DataError, match=r"data.jsonl, row 7: the chat template does not keep the prompt.*thinking.*model.chat_template"
    ):
        render(tokenizer, said(row=7), [tokenizer.eos_token_id], "data.jsonl")


def test_a_template_that_drops_the_target_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] + '<|end|>' }}"
    with pytest.raises(DataError, match="row 0: nothing of the target response is left"):
        render(tokenizer, said(), [tokenizer.eos_token_id])


def test_a_template_that_refuses_a_role_is_reported_with_its_reason(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"row 3: .* refuses the turns system, user, assistant: System role not supported"):
        render(tokenizer, said(system="a", row=3), [tokenizer.eos_token_id])


def test_a_template_that_breaks_on_a_row_is_reported_with_its_reason(tokenizer):
    tokenizer.chat_template = "{{ 1 + messages[0]['content'] }}"
    with pytest.raises(DataError, match=r"row 3: the chat template refuses the turns user, assistant: unsupported operand"):
        render(tokenizer, said(row=3), [tokenizer.eos_token_id])


def test_an_end_token_inside_a_target_is_refused_and_names_the_row(tokenizer):
    with pytest.raises(DataError, match=r"data.jsonl, row 4: the target response holds '<\|end\|>'"):
        render(tokenizer, said(target="a<|end|>b", row=4), [tokenizer.eos_token_id], "data.jsonl")


def test_a_special_token_in_a_prompt_is_kept_as_the_tokenizer_reads_it(tokenizer):
    assert rendered(tokenizer, said("what is <|end|>?"))[0] == "<|user|>what is <|end|>?<|end|><|assistant|>"


def test_a_tokenizer_that_merges_across_the_border_keeps_the_prompt_ids():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|end|>": 0, "a": 1, ":": 2, "2": 3, ":2": 4}
    model = Tokenizer(models.BPE(vocabulary, [(":", "2")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ '' if loop.last and not add_generation_prompt else ':' }}{% endfor %}"
    )
    assert tokenizer("a:2")["input_ids"] == [1, 4]
    assert render(tokenizer, said("a"), [0]) == ([1, 2], [3, 0])


def test_many_conversations_are_rendered_as_one_by_one(tokenizer):
    conversations = [said(f"{n}+1?", f"{n + 1}", row=n) for n in range(20)]
    ends = [tokenizer.eos_token_id]
    assert render_all(tokenizer, conversations, ends) == [render(tokenizer, conversation, ends) for conversation in conversations]
    assert render_all(tokenizer, [], ends) == []


# The tokenizer.


@pytest.fixture
def model(tmp_path, tokenizer):
    """A model directory without weights, which nothing here reads."""
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_tokenizer_loads_with_its_own_template(model):
    assert load_tokenizer(ModelConfig(path=str(model))).chat_template == CHAT_TEMPLATE


def test_a_template_may_be_given_as_text_or_as_a_file(model, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert load_tokenizer(ModelConfig(path=str(model), chat_template=CHATML)).chat_template == CHATML
    assert load_tokenizer(ModelConfig(path=str(model), chat_template=str(tmp_path / "chatml.jinja"))).chat_template == CHATML


def test_plain_joins_the_turns_by_newlines_and_ends_the_response(model):
    tokenizer = load_tokenizer(ModelConfig(path=str(model), chat_template="plain"))
    assert rendered(tokenizer, said(system="Add.")) == ("Add.\n1+1?\n", "2<|end|>")


def test_plain_gives_a_bos_where_the_tokenizer_would(bos_tokenizer, tmp_path):
    bos_tokenizer.save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "model"), chat_template="plain"))
    assert rendered(tokenizer, said()) == ("<s>1+1?\n", "2<|end|>")


def test_a_missing_template_asks_for_one(tmp_path, tokenizer):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no chat template; set model.chat_template .* `plain`"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("template", "message"), [("{% if %}", "not a valid Jinja template"), ("no-such.jinja", "found 'no-such.jinja'")]
)
def test_an_unusable_template_is_a_config_error(model, template, message):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(ModelConfig(path=str(model), chat_template=template))


def test_a_missing_or_empty_model_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "missing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))


def test_a_tokenizer_without_an_end_token_is_a_checkpoint_error(tmp_path, tokenizer):
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no end token"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))


def test_end_tokens_are_those_of_tokenizer_generation_config_and_config(model, tokenizer):
    assert end_tokens(tokenizer, str(model)) == (5,)
    (model / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    (model / "config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(tokenizer, str(model)) == (5, 7, 9)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "5"}', '{"eos_token_id": [true]}'])
def test_a_damaged_model_file_is_named(model, tokenizer, content):
    (model / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config.json: "):
        end_tokens(tokenizer, str(model))


# Identity and split.


def test_prompt_ids_are_stable_and_differ_by_prompt_and_by_target():
    # printf '%s' '["[[\"user\", \"1+1?\"]]", "2"]' | sha256sum | cut -c1-16
    assert prompt_id(said()) == prompt_id(said(row=5)) == "57274354a340f322"
    assert len({prompt_id(said()), prompt_id(said(target="3")), prompt_id(said("1+2?")), prompt_id(said(system="a"))}) == 4


def test_a_split_is_stable_and_takes_about_its_share():
    splits = Counter(split_of(f"prompt {n}", 0.1, 0.2) for n in range(10_000))
    assert splits == Counter(split_of(f"prompt {n}", 0.1, 0.2) for n in reversed(range(10_000)))
    assert abs(splits["validation"] - 1000) < 100 and abs(splits["test"] - 2000) < 150


def test_without_fractions_everything_is_for_training():
    assert {split_of(f"prompt {n}", 0.0, 0.0) for n in range(1000)} == {"train"}


# The stage.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count, start=0):
    return [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(start, start + count)]


def config_for(model, path, **data):
    return resolve_config(
        {
            "run": {"name": "test"},
            "model": {"path": str(model)},
            "data": {"path": path, "validation_fraction": 0.2, "test_fraction": 0.2, "shard_size": 4, **data},
        }
    )


@pytest.fixture
def store(tmp_path):
    return RunStore.open(str(tmp_path / "runs"), "test")


def stored(store, split):
    return [row for path in store.files(store.prompts(split)) for row in store.read_rows(path, Prompt)]


def test_every_row_is_written_once_in_shards_and_committed(tmp_path, model, tokenizer, store):
    config = config_for(model, write(tmp_path / "data.jsonl", sums(50)))
    counts = prepare_prompts(config, store, tokenizer)
    splits = {split: stored(store, split) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": counts.train,
        "validation": counts.validation,
        "test": counts.test,
    }
    assert counts.rows == 50 == counts.train + counts.validation + counts.test
    assert min(counts.train, counts.validation, counts.test) > 0
    assert sorted(prompt.row for rows in splits.values() for prompt in rows) == list(range(50))
    assert [prompt.row for prompt in splits["train"]] == sorted(prompt.row for prompt in splits["train"])
    shards = [len(store.read_rows(path, Prompt)) for path in store.files(store.prompts("train"))]
    assert shards[:-1] == [4] * (len(shards) - 1) and 1 <= shards[-1] <= 4
    first = splits["train"][0]
    assert tokenizer.decode(first.prompt_tokens) == f"<|user|>{first.row}+1?<|end|><|assistant|>"
    assert tokenizer.decode(first.target_tokens) == f"#### {first.row + 1}<|end|>"
    assert first.reference_answer == str(first.row + 1)
    store.verify(store.path("prompts"))


def test_a_committed_stage_is_not_done_again(tmp_path, model, tokenizer, store):
    path = write(tmp_path / "data.jsonl", sums(20))
    counts = prepare_prompts(config_for(model, path), store, tokenizer)
    Path(path).unlink()
    assert prepare_prompts(config_for(model, path), store, tokenizer) == counts


def test_shards_of_a_killed_run_do_not_remain(tmp_path, model, tokenizer, store):
    store.write_rows(store.shard(store.prompts("train"), 99), [], Prompt)
    counts = prepare_prompts(config_for(model, write(tmp_path / "data.jsonl", sums(20))), store, tokenizer)
    assert len(stored(store, "train")) == counts.train
    assert not store.exists(store.shard(store.prompts("train"), 99))


def test_one_prompt_with_several_targets_stays_in_one_split(tmp_path, model, tokenizer):
    rows = [{**row, "answer": f"{row['answer']} {n}"} for row in sums(30) for n in range(3)]
    config = config_for(model, write(tmp_path / "data.jsonl", rows))
    splits = {}
    for fate, prompt, _ in iter_prompts(config, tokenizer):
        splits.setdefault(tuple(prompt.prompt_tokens), []).append(fate)
    assert len(splits) == 30
    assert all(len(fates) == 3 and len(set(fates)) == 1 for fates in splits.values())


def test_adding_rows_moves_no_row_to_another_split(tmp_path, model, tokenizer):
    def splits(count):
        config = config_for(model, write(tmp_path / "data.jsonl", sums(count)))
        return {prompt.prompt_id: fate for fate, prompt, _ in iter_prompts(config, tokenizer)}

    few, many = splits(20), splits(40)
    assert {identity: many[identity] for identity in few} == few


def test_duplicates_are_dropped_and_counted(tmp_path, model, tokenizer, store):
    config = config_for(model, write(tmp_path / "data.jsonl", sums(20) + sums(5)))
    counts = prepare_prompts(config, store, tokenizer)
    assert (counts.rows, counts.duplicates) == (25, 5)
    assert counts.train + counts.validation + counts.test == 20


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path, model, tokenizer):
    # In tokens: the prompt is <|user|> + text + <|end|><|assistant|>, the target is text + <|end|>.
    rows = [
        {"question": "a" * 7, "answer": "b" * 9},  # 10 and 10: fits exactly
        {"question": "a" * 8, "answer": "b"},  # 11: the prompt is too long
        {"question": "a" * 7, "answer": "b" * 10},  # 10 and 11: both together are too long
    ]
    path = write(tmp_path / "data.jsonl", rows)
    config = config_for(model, path, prompt_length=10, max_length=20, validation_fraction=0, test_fraction=0)
    fates = [(fate, prompt and prompt.row) for fate, prompt, _ in iter_prompts(config, tokenizer)]
    assert fates == [("train", 0), ("too_long", None), ("too_long", None)]


def test_heldout_data_is_the_test_split_and_its_prompts_leave_the_rest(tmp_path, model, tokenizer, store):
    heldout = write(tmp_path / "heldout.jsonl", sums(10))
    path = write(tmp_path / "data.jsonl", [{"question": "3+1?", "answer": "another answer"}, *sums(25, start=5)])
    counts = prepare_prompts(config_for(model, path, heldout_path=heldout, limit=20), store, tokenizer)
    # Of 20 rows, "3+1?" and "5+1?" … "9+1?" are held out.
    assert (counts.rows, counts.test, counts.leaked, counts.duplicates) == (30, 10, 6, 0)
    assert counts.train + counts.validation == 14
    heldout_prompts = {tuple(prompt.prompt_tokens) for prompt in stored(store, "test")}
    assert not heldout_prompts & {tuple(prompt.prompt_tokens) for prompt in stored(store, "train") + stored(store, "validation")}


def test_no_training_prompts_is_an_error_that_says_why(tmp_path, model, tokenizer, store):
    path = write(tmp_path / "data.jsonl", sums(3) + sums(1))
    config = config_for(model, path, prompt_length=2, max_length=4)
    with pytest.raises(
        DataError, match=r"no training prompts are left of 4 rows: .* 3 longer than data.prompt_length \(2 .* 1 duplicates"
    ):
        prepare_prompts(config, store, tokenizer)
    assert not store.is_committed(store.path("prompts"))
    with pytest.raises(DataError, match="no training prompts"):
        survey_prompts(config, tokenizer)


def test_an_empty_heldout_split_is_allowed(tmp_path, model, tokenizer, store):
    config = config_for(model, write(tmp_path / "data.jsonl", sums(3)), validation_fraction=0, test_fraction=0)
    counts = PromptCounts(rows=3, train=3, validation=0, test=0, too_long=0, duplicates=0, leaked=0)
    assert prepare_prompts(config, store, tokenizer) == counts
    assert store.files(store.prompts("validation")) == []


def test_the_survey_counts_what_would_be_written_and_measures_it(tmp_path, model, tokenizer, store):
    rows = [{"question": "a", "answer": "b"}, {"question": "abc", "answer": "bcdef"}]
    config = config_for(model, write(tmp_path / "data.jsonl", rows), validation_fraction=0, test_fraction=0)
    survey = survey_prompts(config, tokenizer)
    # Three tokens of template around a prompt, one behind a target.
    assert (survey.mean_prompt_tokens, survey.max_prompt_tokens) == (5.0, 6)
    assert (survey.mean_target_tokens, survey.max_target_tokens) == (4.0, 6)
    assert not store.exists(store.root)
    assert survey.counts == prepare_prompts(config, store, tokenizer)


def test_a_bad_row_names_its_source_and_number(tmp_path, model, tokenizer, store):
    path = write(tmp_path / "data.jsonl", [*sums(3), {"question": "a", "answer": "b<|end|>"}])
    with pytest.raises(DataError, match=r"data.jsonl, row 3: the target response holds"):
        prepare_prompts(config_for(model, path), store, tokenizer)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K does not lie beside the repository (shared/data/gsm8k/train.jsonl)")
def test_gsm8k_targets_all_have_a_reference_answer(model, tokenizer):
    config = config_for(model, str(GSM8K), limit=200, prompt_length=2000, max_length=4000)
    prompts = [prompt for _, prompt, _ in iter_prompts(config, tokenizer)]
    assert len(prompts) == 200
    assert all(prompt.reference_answer for prompt in prompts)
    assert prompts[0].reference_answer == "72"
