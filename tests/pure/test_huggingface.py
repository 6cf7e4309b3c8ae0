"""Hugging Face folders in one process: settings, refusals, and what is written is read again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpmp import commands
from mpmp.checkpoint import ALONE, Held, huggingface, merged, save
from mpmp.checkpoint.huggingface.byte_tokenizer import tokenizer_config_json, tokenizer_json
from mpmp.checkpoint.huggingface.files import ends_of_text, special_tokens
from mpmp.checkpoint.huggingface.settings import FAMILIES, config_json, understood
from mpmp.checkpoint.huggingface.tensors import as_theirs, parts
from mpmp.config import TASKS, Config, Model
from mpmp.data.tokens import ByteTokenizer, FileTokenizer
from mpmp.errors import CheckpointError, ConfigError, InputOutputError
from mpmp.job.beginning import vocabulary_of
from ranks import hf_models

SMALL = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "n_positions": 16,
        "vocab_size": 31,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "vocab_size": 31,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "vocab_size": 31,
    },
}


# --- settings -------------------------------------------------------------------------------------


def test_what_a_folder_leaves_out_is_what_transformers_takes():
    gpt, llama, bert = (understood(SMALL[name], "f").model for name in SMALL)
    assert (gpt.num_hidden, gpt.tied, gpt.norm_eps, gpt.dropout) == (32, True, 1e-5, 0.0)
    assert (llama.tied, llama.norm_eps, llama.rope_base, llama.context) == (False, 1e-6, 1e4, 2048)
    assert (bert.tied, bert.norm_eps, bert.token_types) == (True, 1e-12, 2)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_settings_go_there_and_back(case):
    """And transformers understands them as we do."""
    transformers = pytest.importorskip("transformers")
    theirs = hf_models.make(case).config
    described = understood(theirs.to_dict() | {"architectures": [hf_models.CASES[case][0]]}, "f")
    assert described.notes == ()
    model, tags = described.model, described.tags
    assert tags == tuple(theirs.id2label.values()) if case == "bert-tags" else not tags
    said = json.loads(json.dumps(config_json(model, model.vocabulary, tags, "float64", {})))
    again = understood(said, "f")
    assert (
        again.tags == tags
        and config_json(again.model, model.vocabulary, tags, "float64", {}) == said
    )
    read = getattr(transformers, hf_models.CASES[case][1]).from_dict(said).to_dict()
    unlike = {key for key, one in theirs.to_dict().items() if read[key] != one}
    # n_inner None means what we write; the other two are of folders, not of a model in memory.
    assert unlike <= {"n_inner", "architectures", "dtype", *TOKENS}


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

OTHERS = [
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("llama", {"attention_bias": True}, "attention_bias True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"head_dim": 4}, "head_dim 4"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"num_key_value_heads": 3}, "model.kv_heads 3"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"is_decoder": True}, "is_decoder True"),
    ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
    ("bert", {"architectures": None}, "None"),
    ("bert", {"architectures": [["BertModel"]]}, "['BertModel']"),
]


@pytest.mark.parametrize(("family", "change", "words"), OTHERS)
def test_what_cannot_be_computed_is_refused(family, change, words):
    with pytest.raises(ConfigError, match="config.json of f ") as caught:
        understood(SMALL[family] | change, "f")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"n_layer": "2"}, {"n_head": True}, {"layer_norm_epsilon": None}, {"vocab_size": 1.5}],
)
def test_values_of_a_wrong_type_are_damage(change):
    with pytest.raises(CheckpointError, match="no such value"):
        understood(SMALL["gpt2"] | change, "f")
    with pytest.raises(CheckpointError, match="does not say n_layer"):
        understood({key: one for key, one in SMALL["gpt2"].items() if key != "n_layer"}, "f")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10**400},
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"attention_dropout": 10**400},
    ],
)
def test_positions_of_a_wrong_type_are_damage(change):
    with pytest.raises(CheckpointError, match=f"says {next(iter(change))} .{{0,80}}, (no|which)"):
        understood(SMALL["llama"] | change, "f")


def test_settings_of_positions_change_no_others():
    described = understood(SMALL["llama"] | {"rope_parameters": {"hidden_size": 16}}, "f")
    assert described.model.width == 8 and "rope_parameters.hidden_size 16" in described.notes[0]


def test_what_is_left_out_is_named():
    described = understood(SMALL["llama"] | {"sliding_window": 4, "attention_dropout": 0.1}, "f")
    assert (
        "sliding_window 4" in described.notes[0] and "attention_dropout 0.1" in described.notes[1]
    )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Model(kind="mlp"), "kind mlp"),
        (Model(experts=4), "4 experts"),
        (Model(heads=4, kv_heads=2), "2 KV heads"),
        (Model(kind="bert", tied=False), "output layer of its own"),
    ],
)
def test_models_that_transformers_has_not_are_not_written(model, why):
    with pytest.raises(ConfigError, match=why):
        config_json(model, 9, (), "float32", {})


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 90), (7, 83), (28, 31), (40, 41)])
def test_a_flat_piece_of_a_turned_stack_is_boxes_of_theirs(start, stop):
    """What ZeRO holds of stacked (3, 6, 5) weights, as GPT-2 has them in (5, 18)."""
    theirs = torch.arange(90.0).view(5, 18)
    found = parts(FAMILIES[0], "blocks.7.attention.qkv.weight", (3, 6, 5))
    assert found[0].name == "transformer.h.7.attn.c_attn.weight"
    flat = torch.zeros(stop - start)
    box = ((0, 3), (0, 6), (0, 5))
    for one in as_theirs(Held("weight/x", (3, 6, 5), box, flat, start, stop), found):
        assert one.shape == (5, 18)
        one.tensor.copy_(theirs[tuple(slice(*ends) for ends in one.box)])
    whole = torch.stack([one.t() for one in theirs.split(6, dim=1)])
    assert torch.equal(flat, whole.flatten()[start:stop])


# --- there and back -------------------------------------------------------------------------------


def merged_model(folder: Path, case: str, path: Path) -> Model:
    """The model of a folder as our merged file."""
    described = huggingface.describe(str(folder))
    model, names = described.model, load_file(folder / "model.safetensors")
    ours = ours_of(model, described.tags, next(iter(names.values())).dtype)
    wants = [Held.whole(f"weight/{name}", one) for name, one in ours.items()]
    notes = huggingface.load_folder(str(folder), wants, ALONE, model)
    assert notes == ()
    meta = {"config": {"model": asdict(model)}, "tags": described.tags}
    save_file(ours, path, merged.metadata(0, meta))
    return model


def ours_of(model: Model, tags: tuple[str, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of our model, by the reference of its kind, and empty."""
    from mpmp.models.bert_reference import ReferenceBERT
    from mpmp.models.gpt_reference import ReferenceGPT
    from mpmp.models.llama_reference import ReferenceLLaMA

    names = ("layers", "heads", "width", "tied", "vocabulary")
    shape = {name: getattr(model, name) for name in names}
    if model.kind == "llama":
        plain = ReferenceLLaMA(kv_heads=model.num_kv_heads, hidden=model.num_hidden, **shape)
    else:
        kind = ReferenceBERT if model.kind == "bert" else ReferenceGPT
        plain = kind(context=model.context, **shape)
    found = {}
    for name, one in plain.named_parameters():
        size = list(one.shape)
        for stack, blocks in (("qkv", 3), ("kv", 2), ("up", 2 if model.kind == "llama" else 1)):
            if f".{stack}." in name and blocks > 1:
                size = [blocks, size[0] // blocks, *size[1:]]
        if ".mlp." in name and model.kind != "llama":  # references have 4 D hidden units
            size = [model.num_hidden if n == 4 * model.width else n for n in size]
        if not (tags and name.startswith("head.")):
            found[name] = torch.empty(size, dtype=dtype)
    if tags:
        found["tags.weight"] = torch.empty(len(tags), model.width, dtype=dtype)
        found["tags.bias"] = torch.empty(len(tags), dtype=dtype)
    return found


@pytest.mark.parametrize("case", hf_models.CASES)
@pytest.mark.parametrize("shard_bytes", [1 << 40, 9000])
def test_export_then_import_is_byte_equal_and_transformers_loads_it(tmp_path, case, shard_bytes):
    transformers = pytest.importorskip("transformers")
    theirs = hf_models.make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    merged_model(tmp_path / "theirs", case, tmp_path / "model.safetensors")

    out = tmp_path / "out"
    huggingface.export_folder(str(tmp_path / "model.safetensors"), str(out), shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_bytes == 9000)
    written = {}
    for shard in shards:
        found = load_file(shard)
        assert not written.keys() & found.keys()
        written |= found
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == first.keys()
    assert all(torch.equal(one, written[name]) for name, one in first.items())

    with pytest.raises(ConfigError, match="out is there already"):
        huggingface.export_folder(str(tmp_path / "model.safetensors"), str(out), shard_bytes)

    # What is read of it again is what it was written of, also in shards.
    described = huggingface.describe(str(out))
    ours = ours_of(described.model, described.tags, torch.float64)
    wants = [Held.whole(f"weight/{name}", one) for name, one in ours.items()]
    assert huggingface.load_folder(str(out), wants, ALONE, described.model) == ()
    before = load_file(tmp_path / "model.safetensors")
    assert before.keys() == ours.keys()
    assert all(torch.equal(one, ours[name]) for name, one in before.items())

    kind = getattr(transformers, hf_models.CASES[case][0])
    again, said = kind.from_pretrained(out, dtype=torch.float64, output_loading_info=True)
    assert not any(said.values()), said
    # A merged file says what it holds, and is read by the same call.
    described = huggingface.describe(str(tmp_path / "model.safetensors"))
    assert (described.model.vocabulary, described.theirs) == (hf_models.VOCABULARY, False)
    ours, notes = taken(tmp_path / "model.safetensors", described.model, described.tags)
    assert notes == () and all(torch.equal(one, ours[name]) for name, one in before.items())

    found, expected = (hf_models.logits(one, case) for one in (again.eval(), theirs))
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)


def test_damage_of_a_step_is_told_with_its_name_and_the_way_out(tmp_path):
    model = Model(layers=1, heads=1, width=4, context=4, vocabulary=5)
    held = [
        Held.whole(f"weight/{name}", torch.zeros_like(one))
        for name, one in ours_of(model, (), torch.float32).items()
    ]
    step = save(tmp_path / "run", 7, held, {"config": {"model": asdict(model)}}, ALONE, 1)
    huggingface.export_folder(str(step), str(tmp_path / "good"), 1 << 30)
    shard = step / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    said = rf"{step}: shard_00000\S* is damaged in block 0 of 1 .*; name an older step's folder"
    for source in (step, tmp_path / "run"):
        with pytest.raises(CheckpointError, match=said):
            huggingface.export_folder(str(source), str(tmp_path / "out"), 1 << 30)
    assert {one.name for one in tmp_path.iterdir()} == {"run", "good"}


def test_an_export_takes_a_place_of_its_own(tmp_path, monkeypatch):
    """Whatever has such a name beside it, and with the rights that folders have."""
    model = Model(layers=1, heads=1, width=4, context=4, vocabulary=5)
    ours = ours_of(model, (), torch.float32)
    meta = merged.metadata(0, {"config": {"model": asdict(model)}})
    save_file(ours, tmp_path / "model.safetensors", meta)
    beside = tmp_path / "out.tmp"
    beside.mkdir()
    (beside / "mine").write_text("")
    (tmp_path / "out").mkdir()

    def export(to):
        huggingface.export_folder(str(tmp_path / "model.safetensors"), str(to), 1 << 30)

    export(tmp_path / "out")
    assert (beside / "mine").exists() and (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for taken_place in (".", tmp_path / "model.safetensors"):
        with pytest.raises(ConfigError, match="is there already"):
            export(taken_place)
    assert {one.name for one in tmp_path.iterdir()} == {
        "model.safetensors",
        "out",
        "out.tmp",
        "empty",
    }


@pytest.mark.parametrize(
    "said",
    [
        {"model": '{"layers": 4.0}'},
        {"model": '{"kind": "foo"}'},
        {"model": '{"tied": "false"}'},
        {"model": '{"norm_eps": 1' + "0" * 400 + "}"},
        {"model": "[" * 100_000},
        {"model": "{}", "tags": '"PER"'},
        {"model": "{}", "tags": "[1]"},
    ],
)
def test_a_merged_file_that_says_nonsense_is_refused(said):
    with pytest.raises(CheckpointError, match=r"^m\.safetensors .*(makes no sense|understand)"):
        merged.described(said | {merged.ROWS: 5}, "m.safetensors")
    assert merged.described({"model": '{"dropout": 0}', merged.ROWS: 5}, "m").model.vocabulary == 5


def taken(folder: Path, model: Model, tags: tuple[str, ...] = ()) -> tuple[dict, tuple[str, ...]]:
    """Our tensors, of NaN where the folder has none for them; and what was said."""
    ours = ours_of(model, tags, torch.float64)
    for one in ours.values():
        one.fill_(torch.nan)
    wants = [Held.whole(f"weight/{name}", one) for name, one in ours.items()]
    return ours, huggingface.load_folder(str(folder), wants, ALONE, model)


def test_old_names_and_buffers_are_understood(tmp_path):
    """GPT-2 as OpenAI's folder has it, BERT as Google's."""
    gpt, bert = tmp_path / "gpt", tmp_path / "bert"
    tensors = hf_models.write_gpt2(gpt, torch.float64)
    plain = {name.removeprefix("transformer."): one for name, one in tensors.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    plain["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(plain, gpt / "model.safetensors")
    ours, notes = taken(gpt, huggingface.describe(str(gpt)).model)
    expected = hf_models.gpt2_as_ours(tensors)
    assert notes == () and ours.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in ours.items())

    pytest.importorskip("transformers")
    hf_models.make("bert").save_pretrained(bert)
    model = huggingface.describe(str(bert)).model
    before, notes = taken(bert, model)
    names = load_file(bert / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): one
        for name, one in names.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(11)[None]
    old["bert.pooler.dense.weight"] = torch.ones(24, 24)
    save_file(old, bert / "model.safetensors")
    after, more = taken(bert, model)
    assert notes == () and len(more) == 1 and "leaves it out: bert.pooler.dense.weight" in more[0]
    assert all(torch.equal(one, after[name]) for name, one in before.items())

    # A tagger that begins from it has a classifier of its own.
    ours, said = taken(bert, model, ("O", "B-X"))
    random = {name for name, one in ours.items() if one.isnan().any()}
    assert random == {"tags.weight", "tags.bias"}
    assert "begins at random: tags.bias, tags.weight" in said[0]
    assert "cls.predictions.bias" in said[1]


# --- tokenizers -----------------------------------------------------------------------------------

TEXT = "for x in räumen: # \u2192 ok\n\t<|endoftext|>"


@pytest.mark.parametrize("masked", (False, True))
def test_bytes_are_a_tokenizer_that_others_read(tmp_path, masked):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(masked)))
    ours, file = ByteTokenizer(), FileTokenizer(str(tmp_path / "tokenizer.json"))
    plain = TEXT.removesuffix("<|endoftext|>")
    assert file.encode(plain).tolist() == ours.encode(plain).tolist() == list(plain.encode())
    assert (file.vocabulary, file.end_of_text) == (257 + masked, 256)
    assert file.mask == (257 if masked else None)
    said = json.dumps(tokenizer_config_json(32, masked))
    (tmp_path / "tokenizer_config.json").write_text(said)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT)["input_ids"]
    assert ids == [*plain.encode(), 256] and theirs.decode(ids) == TEXT
    assert special_tokens(tmp_path) == {"eos_token_id": 256}


def test_a_tokenizer_travels_with_all_that_belongs_to_it(tmp_path):
    theirs, target = tmp_path / "a", tmp_path / "b"
    theirs.mkdir()
    target.mkdir()
    tokens = [{"id": 5, "content": "<eot>"}, {"id": 0, "content": "<s>"}]
    (theirs / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (theirs / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eot>"}}')
    (theirs / "merges.txt").write_text("a b")
    (theirs / "other.txt").write_text("")
    names = huggingface.copy_tokenizer(theirs, target)
    assert names == ["tokenizer.json", "tokenizer_config.json", "merges.txt"]
    assert all((target / one).read_bytes() == (theirs / one).read_bytes() for one in names)
    assert not (target / "other.txt").exists()
    assert special_tokens(target) == {"eos_token_id": 5, "bos_token_id": 0}


def test_tokens_that_end_a_text_stand_in_three_files(tmp_path):
    assert ends_of_text(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, null, "x"]}')
    tokens = [{"id": 5, "content": "<eot>"}, 3, {"id": [], "content": {}}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert ends_of_text(tmp_path) == [2, 7]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eot>", "pad_token": [1]}')
    assert ends_of_text(tmp_path) == [2, 5, 7]
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": 3}')
    assert special_tokens(tmp_path) == {}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputOutputError, match="config.json cannot be read: Is a directory"):
        huggingface.describe(str(tmp_path))


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path):
    """A folder without a model's tensors: what a command line needs of it."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL["gpt2"]))
    save_file({}, tmp_path / "model.safetensors")
    return tmp_path


def parsed(*arguments):
    return commands.parse("train", "", Config(), arguments, TASKS)


def test_model_settings_come_from_the_folder(gpt2, tmp_path):
    config = parsed("--model.weights", str(gpt2), "--model.seed", "7", "--train.steps", "3")
    model = config.model
    assert (model.layers, model.width, model.vocabulary, model.seed) == (2, 8, 31, 7)
    assert config.data.tokenizer is None and model.weights == str(gpt2)
    (gpt2 / "tokenizer.json").write_text("{}")
    (tmp_path / "r.toml").write_text(f'[model]\nweights = "{gpt2}"\ncontext = 8\n')
    config = parsed("--recipe", str(tmp_path / "r.toml"))
    assert config.data.tokenizer == str(gpt2 / "tokenizer.json")
    assert (config.model.layers, config.model.context) == (2, 8)
    assert parsed("--recipe", str(tmp_path / "r.toml"), "--model.layers=3").model.layers == 3


def test_tagging_needs_a_folder_of_bert(gpt2, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--task", "tagging", f"--model.weights={gpt2}")
    assert ended.value.code == 2 and "bert" in capsys.readouterr().err


def test_a_vocabulary_has_room_for_the_tokenizer():
    assert vocabulary_of(Model(), 257) == 257 and vocabulary_of(Model(vocabulary=300), 257) == 300
    with pytest.raises(
        ConfigError, match="model.vocabulary is 37 and the tokenizer has 257 tokens"
    ):
        vocabulary_of(Model(vocabulary=37), 257)
