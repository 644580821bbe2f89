"""The words of the nodes in every language: each node and input has them, and none is left over."""

import importlib
import re

import pytest

locales = importlib.import_module("locales")
LANGUAGES = sorted(folder.name for folder in locales.FOLDER.iterdir() if folder.is_dir())
TRANSLATED = [language for language in LANGUAGES if language != locales.ENGLISH]
LINKED = ("model", "samples")  # links, that nobody has to turn
every_language = pytest.mark.parametrize("language", LANGUAGES)
every_translation = pytest.mark.parametrize("language", TRANSLATED)


@pytest.fixture
def english(host):
    return locales.words([node.GET_SCHEMA() for node in importlib.import_module("pack.nodes").NODES])


def test_the_two_largest_communities_have_their_languages():
    assert {"en", "zh"} <= set(LANGUAGES)


def test_english_is_what_the_nodes_say(english):
    assert locales.read(locales.ENGLISH) == english, "run: make schemas"


@every_language
def test_every_node_and_input_has_its_words_and_none_is_left_over(english, language):
    assert locales.differences(english, locales.read(language)) == []


def test_what_is_missing_and_what_is_left_over_are_named():
    english = {"Node": {"display_name": "Node", "inputs": {"knob": {"name": "knob", "tooltip": "Turn it."}}}}
    other = {"Node": {"display_name": "Knoten", "inputs": {"knob": {"name": "Knopf"}, "old": {"name": "alt"}}}}
    assert locales.differences(english, english) == []
    assert locales.differences(english, other) == [
        "Node.inputs.knob.tooltip is missing: 'Turn it.'", "Node.inputs.old.name belongs to no node",
    ]


@every_language
def test_the_frontend_can_read_every_text(language):
    """It takes these signs for its own (vue-i18n: places to fill in, linked messages, plurals), and fails on or cuts the text."""
    for path, text in locales.flat(locales.read(language)).items():
        assert isinstance(text, str) and text.strip() and not re.search(r"[{}@|]", text), path


@every_translation
def test_a_translation_is_one(language):
    """Texts differ from the English ones, except names that are the same in both, such as "LATENT"."""
    theirs = locales.flat(locales.read(language))
    same = {path for path, text in locales.flat(locales.read(locales.ENGLISH)).items() if theirs.get(path) == text}
    assert {path for path in same if not path.endswith(".name")} == set()


@every_translation
def test_a_translation_names_the_same_values(english, language):
    """A tooltip's numbers and options are those of the English one, so one that has fallen behind shows."""
    theirs = locales.flat(locales.read(language))
    inputs = [part for node in importlib.import_module("pack.nodes").NODES for part in node.GET_SCHEMA().inputs]
    options = sorted({option for part in inputs for option in getattr(part, "options", None) or ()})
    said = re.compile(r"-?\d[\d,.]*\d|-?\d|" + "|".join(rf"(?<![A-Za-z_]){re.escape(option)}(?=[:\uff1a])" for option in options))
    for path, text in locales.flat(english).items():
        assert set(said.findall(theirs.get(path, text))) >= set(said.findall(text)), path


@every_translation
def test_a_translated_input_still_tells_its_id(english, language):
    """Errors and the line on the node call it by its id."""
    for node, words in locales.read(language).items():
        for name, word in words["inputs"].items():
            if english[node]["inputs"][name]["name"] != word["name"]:
                assert name in LINKED or name in word["tooltip"], f"{node}.{name}"
