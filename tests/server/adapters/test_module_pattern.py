"""Patterns mean what PEFT makes of them, and no expression takes long."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from perseid_server.adapters.module_pattern import ModulePattern

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]

KEYS = [
    "q_proj",
    "self_attn.q_proj",
    "proj",
    "layers.1",
    "layers.1.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "odel.layers.1.mlp.up_proj",
    "up.proj",
    "^model.layers.0.self_attn.q_proj",
    "^q_proj",
    "",
    ".*",
    ".*mlp.*",
    r"layers\.1\..*",
    r"layers\.(0|10)\..*_proj",
    r"(?:q|k)_proj",
    r"(?P<which>up|down)_proj",
    r"layers\.[0-9]+\.mlp\.(?:up|down)_proj",
    r"layers\.\d{2}\.\w+\.\w+",
    r"layers\.\d{1,2}?\.mlp\.up_proj$",
    r"layers\.[^1]\..*",
    r"layers\.[0]\.self_attn\.[]qk]_proj",
    "q_proj|k_proj",
    "(q_proj|mlp.*)",
    "(self_attn.)?q_proj",
    r"\Amodel.*down_proj\Z",
    r"[\w.]*_proj",
    "((u|d)(p|own))_proj",
    "(x?)*up_proj",
    "(a|)(b|)q_proj",
    r"self\_attn\.q_proj",
]

REFUSED = {
    "(": "unterminated",
    "q)": "unbalanced",
    "[a-": "character set",
    "[z-a]": "bad character range",
    "*q": "nothing to repeat",
    "q**": "repetition",
    "^*q": "nothing to repeat",
    "q{3,1}": "min repeat",
    "q*+": "possessive",
    "(?i)q_proj": "groups that begin with",
    "(?=q)q_proj": "groups that begin with",
    r"(q)\1": "escape",
    r"\bq_proj": "escape",
    "q\\": "escape",
    "(" * 9 + "q" + ")" * 9: "nested",
    "q_proj|" * 40: "characters",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_what_peft_matches(key):
    pattern = ModulePattern.parse(key)
    for module in MODULES:
        assert pattern.matches(module) == (get_pattern_key([key], module) == key), module


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_an_expression_or_not_supported_is_refused(key):
    with pytest.raises(ValueError, match=re.escape(REFUSED[key])):
        ModulePattern.parse(key)


@pytest.mark.parametrize(
    "key",
    [
        "(.|.)" * 50 + "#",
        r"\w?" * 80 + "#",
        "(a*)*" * 50 + "#",
        ".*" * 120 + "#",
        "((((((((.*)*)*)*)*)*)*)*)*#",
        "((.{999}){999}){999}",
        "((.?){999}){0,999}#",
    ],
)
def test_an_expression_that_keeps_re_busy_for_ever_ends_at_once(key):
    assert not ModulePattern.parse(key).matches("model.layers.11.self_attn.q_proj")


def test_a_long_name_is_still_a_name():
    pattern = ModulePattern.parse("model." + "a" * 5000)
    assert pattern.is_name
    assert pattern.matches("model." + "a" * 5000)


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$"])
REPEATABLE = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w"])
REPETITIONS = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])
PIECES = ATOMS | st.builds(str.__add__, REPEATABLE, REPETITIONS)


def _group(first: str, second: str, repetition: str, rest: str) -> str:
    """A group of groups is not repeated: `re`, the oracle, would be busy with some of those for ever."""
    nested = "(" in first + second
    return f"({first}|{second}){'' if nested else repetition}{rest}"


EXPRESSIONS = st.recursive(
    st.lists(PIECES, max_size=4).map("".join),
    lambda inner: st.builds(_group, inner, inner, REPETITIONS | st.just(""), st.lists(PIECES, max_size=2).map("".join)),
    max_leaves=4,
)


@given(EXPRESSIONS, st.text("ab.", max_size=7))
def test_any_expression_means_what_re_makes_of_it(expression, text):
    expected = re.match(rf"(.*\.)?({expression})$", text) is not None
    assert ModulePattern.parse(expression).matches(text) == expected
