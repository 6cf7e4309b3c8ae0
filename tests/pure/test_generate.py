"""What follows a prompt: draws, text as it comes, what ends it, how it is shown; refusals."""

from __future__ import annotations

import io

import pytest
import torch

from mpmp.data.tokens import ByteTokenizer, FileTokenizer
from mpmp.errors import ConfigError, InputOutputError, LayoutError, NotFiniteError
from mpmp.job.bench.generate.rows import Row, shown
from mpmp.job.bench.generate.settings import GenerateTokens
from mpmp.job.generation_screen import Screen
from mpmp.job.generation_settings import Generate
from mpmp.job.generation_text import Continuation, Decoded, Ends
from mpmp.models.choice import Choice

BYTES = ByteTokenizer()
LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, -30.0])


def draws(choice, count=4000):
    logits = LOGITS.expand(count, -1)
    return choice.next(logits, range(count), [7] * count)


def shares(tokens):
    return torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)


# --- the choice -----------------------------------------------------------------------------------


def test_without_a_temperature_the_likeliest_token_is_taken():
    assert draws(Choice(), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_draws_have_the_probabilities_of_the_softmax(temperature):
    expected = (LOGITS.double() / temperature).softmax(-1)
    assert (shares(draws(Choice(temperature))) - expected).abs().max() < 0.03


def test_top_k_draws_from_so_many_and_in_their_proportions():
    found = shares(draws(Choice(1.0, top_k=3)))
    expected = LOGITS.double().masked_fill(LOGITS < 1.0, float("-inf")).softmax(-1)
    assert found[[1, 3, 5]].sum() == 0 and (found - expected).abs().max() < 0.03


def test_top_p_draws_from_the_fewest_that_have_the_share():
    probabilities = LOGITS.double().softmax(-1)
    two = float(probabilities[0] + probabilities[4])
    assert set(draws(Choice(1.0, top_p=two - 1e-6)).tolist()) == {0, 4}
    assert set(draws(Choice(1.0, top_p=two + 1e-6)).tolist()) == {0, 2, 4}
    assert set(draws(Choice(1.0, top_k=2, top_p=1e-9)).tolist()) == {0}


def test_a_draw_hangs_on_seed_prompt_place_and_nothing_else():
    choice, logits = Choice(1.0, seed=3), torch.randn(5, 50, generator=torch.manual_seed(1))
    whole = choice.next(logits, [0, 1, 2, 3, 4], [9, 8, 7, 6, 5]).tolist()
    assert [int(choice.next(logits[n : n + 1], [n], [9 - n])) for n in range(5)] == whole
    same = logits[:1].expand(64, -1)
    for others in (
        Choice(1.0, seed=4).next(same, [0] * 64, range(64)),
        choice.next(same, [1] * 64, range(64)),
        choice.next(same, [0] * 64, range(1, 65)),
    ):
        assert others.tolist() != choice.next(same, [0] * 64, range(64)).tolist()


def test_few_candidates_get_the_noise_that_they_have_among_all():
    logits = torch.randn(40, 30, generator=torch.manual_seed(2))
    places = range(40)
    all_of_them = Choice(1.0, top_k=30, top_p=1 - 1e-12).next(logits, places, places)
    assert all_of_them.tolist() == Choice(1.0).next(logits, places, places).tolist()


def test_logits_that_are_no_numbers_end_it():
    with pytest.raises(NotFiniteError, match="not finite"):
        Choice().next(torch.tensor([[0.0, float("nan")]]), [0], [1])


# --- text -----------------------------------------------------------------------------------------

TEXT = "naïve 日本 🙂 ok"


def test_text_comes_as_soon_as_its_characters_are_whole():
    decoded, parts = Decoded(BYTES, BYTES.encode("é")), []
    for byte in TEXT.encode():
        parts.append(decoded.add([byte]))
    assert "".join(parts) == TEXT and "\ufffd" not in TEXT
    ends = [at for at, part in enumerate(parts) if part]
    assert len(ends) == len(TEXT) and decoded.rest() == ""


def test_broken_bytes_are_held_back_until_they_are_sure_to_be_broken():
    decoded = Decoded(BYTES, [])
    assert decoded.add([0xF0]) == "" and decoded.add([0x9F]) == ""
    assert decoded.add([ord("a")]) == "\ufffda"
    assert decoded.add([0xE6]) == "" and decoded.rest() == "\ufffd"


def test_characters_in_tokens_of_bytes_come_whole(tmp_path):
    """As LLaMA's tokenizer has them, whose decoder makes a mark of each byte."""
    library = pytest.importorskip("tokenizers")
    vocabulary = {"a": 256} | {f"<0x{byte:02X}>": byte for byte in range(256)}
    made = library.Tokenizer(library.models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = library.decoders.Sequence(
        [library.decoders.ByteFallback(), library.decoders.Fuse()]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(str(tmp_path / "tokenizer.json"))
    for text in ("a🙂aa", "日本🙂é" * 9 + "a", "aé" * 20):
        decoded = Decoded(tokenizer, [256])
        parts = [decoded.add([int(token)]) for token in tokenizer.encode(text)]
        assert "".join(parts) + decoded.rest() == text


def spoken(text, **ends):
    """A continuation that says a text, and what it gave after each token."""
    row = Continuation(0, BYTES.encode("> "), BYTES, Ends(**{"tokens": 99, "context": 999} | ends))
    given = []
    for token in BYTES.encode(text):
        if row.ended:
            break
        row.add(int(token))
        given.append(row.fresh())
    return row, given


def test_a_stop_text_ends_it_and_is_never_shown():
    row, given = spoken("one, two; and more", texts=("; and", "two; x"))
    assert "".join(given) == row.text == "one, two" and "; and" in row.ended
    assert all("t" not in one for one in given[:6])
    row, given = spoken("aab", texts=("ab",))
    assert "".join(given) == "a"


def test_what_only_looked_like_a_stop_is_shown_after_all():
    row, given = spoken("one; but", texts=("; and",))
    assert "".join(given) == "one; but" and given[3] == given[4] == ""
    row, given = spoken("one; a", texts=("; and",), tokens=6)
    assert "".join(given) == row.text == "one; a"


def test_it_says_why_it_ended():
    assert spoken("abcdef", tokens=3)[0].ended == "3 tokens"
    assert spoken("abcdef", context=6)[0].ended == "the context of 6 tokens is full"
    row, given = spoken("ab", numbers=frozenset({ord("b")}))
    assert row.ended == "end of text" and row.text == "a" and row.tokens == [97, 98]
    assert spoken("ab")[0].ended == ""


def test_the_screen_shows_prompts_in_their_order():
    ends = Ends(tokens=3, context=99)
    rows = [Continuation(n, BYTES.encode(text), BYTES, ends) for n, text in enumerate(("p:", "q:"))]
    stream = io.StringIO()
    screen = Screen(True, ["p:", "q:", "r:"], rows, stream)
    seen = []
    for one, two in zip(b"abc", b"xyz", strict=False):
        for row, token in zip(rows, (one, two), strict=False):
            row.add(token)
            screen.said(row)
        seen.append(stream.getvalue())
    screen.show(2, "elsewhere")
    first = "--- prompt 1 of 3\np:"
    assert seen[:2] == [first + "a", first + "ab"]
    assert stream.getvalue() == (
        first + "abc\n--- prompt 2 of 3\nq:xyz\n--- prompt 3 of 3\nr:elsewhere\n"
    )


def test_signs_that_a_terminal_has_not_are_shown_as_question_marks(monkeypatch):
    told = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(told, encoding="ascii"))
    monkeypatch.setattr("mpmp.job.generation_screen.terminal_of_launcher", lambda: None)
    Screen(True, ["é"], []).show(0, "日a")
    assert told.getvalue() == b"??a\n"


def test_a_tokenizers_file_says_what_stands_in_front_of_a_text(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    assert FileTokenizer(str(path)).opening == []
    made.post_processor = library.processors.TemplateProcessing(
        single="<s> $A <s>", special_tokens=[("<s>", 0)]
    )
    made.save(str(path))
    assert FileTokenizer(str(path)).opening == [0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"tokens": 0}, ConfigError, "--tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, ConfigError, "--temperature must be 0 or at least"),
        ({"temperature": float("nan")}, ConfigError, "--temperature must be 0 or at least"),
        ({"temperature": 1e-310}, ConfigError, "--temperature must be 0 or at least 1e-06"),
        ({"top_k": 0}, ConfigError, "--top-k"),
        ({"top_p": 0.0}, ConfigError, "--top-p"),
        ({"stop": ("",)}, ConfigError, "--stop needs a text"),
        ({"layout": "cp2"}, LayoutError, "cp cuts a sequence"),
        ({"layout": "dp2.ep2"}, LayoutError, "ep makes replicas wait"),
        ({"layout": "tp2.sp"}, LayoutError, "sp cuts a sequence"),
        ({"layout": "dp2.zero3"}, LayoutError, "zero shares out"),
        ({"layout": "quick"}, ConfigError, "not understood"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, kind, words):
    with pytest.raises(kind, match=words):
        Generate(**settings)


def test_prompts_come_from_flags_and_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("two\n\nfour\n", encoding="utf-8")
    assert Generate(prompt=("one",), prompts=str(path)).texts() == ["one", "two", "", "four"]
    path.write_text("one\x0cpage\u2028line\x85\r\ntwo", encoding="utf-8-sig", newline="")
    assert Generate(prompts=str(path)).texts() == ["one\x0cpage\u2028line\x85", "two"]
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="nothing to continue"):
        Generate(prompts=str(path)).texts()
    with pytest.raises(ConfigError, match="prompt 2 has bytes that are not UTF-8"):
        Generate(prompt=("a", b"\xe9".decode(errors="surrogateescape"))).texts()
    path.write_bytes(b"\xff")
    for wrong in (str(path), str(tmp_path / "none")):
        with pytest.raises(InputOutputError, match="cannot be read"):
            Generate(prompts=wrong).texts()


# --- the bench ------------------------------------------------------------------------------------


def test_rows_of_the_bench_are_medians_of_pairs():
    row = Row.of("small", [10.0, 20.0, 40.0], [5.0, 20.0, 10.0])
    assert row == Row("small", 20.0, 10.0, 2.0)
    assert "2.00" in shown([row], "transformers")
    assert Row.of("small", [3.0, 1.0, 2.0], []).ours_tokens_per_s == 2.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sizes": "large"}, "large"),
        ({"sizes": ","}, "--sizes needs names"),
        ({"tokens": 0}, "--tokens must be at least 1"),
        ({"prompt": 100, "tokens": 29}, "more than the context of small, 128"),
    ],
)
def test_the_bench_refuses_what_it_cannot_measure(settings, words):
    with pytest.raises(ConfigError, match=words):
        GenerateTokens(**settings)
