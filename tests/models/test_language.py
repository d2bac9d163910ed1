"""Language models: training equals decoding, sampling, what cannot be decoded, and learning."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.registry import list_systems
from foveate.mechanisms.past import Past, State, past_bytes
from foveate.models.language import DecoderLayer, LanguageModel, language_model, transnormer_llm
from foveate.tasks.text import TextWorkload
from tests.tasks.stand_ins import Dense

VOCAB = 11
LINEAR = ("lightning_attention", "lightning_attention_2", "transnormer_llm")
DECODABLE = [
    facts.key
    for facts in list_systems()
    if facts.causal != "no" and hasattr(facts.cls, "prefill") and hasattr(facts.cls, "step")
]
CAUSAL = [f.key for f in list_systems() if f.causal != "no" and 1 in f.dims and f.layout != "cross"]


def build(key="lightning_attention", dtype=torch.float64, **options):
    options = {"vocab": VOCAB, "context": 32, "dim": 16, "heads": 2, "depth": 2} | options
    return randomised(language_model(key, **options)).to(dtype).eval()


def tiny_transnormer(dtype=torch.float64, chunk=64):
    made = transnormer_llm(vocab=VOCAB, dim=16, heads=2, depth=3, hidden=24, chunk=chunk)
    return randomised(made).to(dtype)


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids(n=20, b=2):
    return torch.randint(VOCAB, (b, n))


def on(model, backend):
    for part in model.modules():
        if isinstance(getattr(part, "backend", None), str):
            part.backend = backend
    return model


@pytest.mark.parametrize("key", LINEAR)
def test_quadratic_chunk_and_recurrent_forms_give_the_same_logits(key):
    model, tokens = build(key), ids(32)
    expected = on(model, "chunk")(tokens)
    for backend in ("reference", "recurrent"):
        torch.testing.assert_close(on(model, backend)(tokens), expected)


@pytest.mark.parametrize("key", DECODABLE)
def test_steps_give_the_logits_of_training(key):
    model, tokens = build(key), ids()
    whole = model(tokens)
    logits, caches = model.prefill(tokens[:, :12])
    torch.testing.assert_close(logits, whole[:, :12])
    for t in range(12, 20):
        logits, caches = model.step(tokens[:, t], caches)
        torch.testing.assert_close(logits, whole[:, t])
    assert caches.length == 20


def test_transnormer_llm_quadratic_chunk_and_step_by_step():
    model, tokens = tiny_transnormer(chunk=8), ids(40)
    whole = on(model, "reference")(tokens)
    torch.testing.assert_close(on(model, "auto")(tokens), whole)
    first, caches = model.prefill(tokens[:, :17])
    second, caches = model.prefill(tokens[:, 17:30], caches)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[:, :30])
    kept, size = caches, past_bytes(caches)
    for t in range(30, 40):
        logits, caches = model.step(tokens[:, t], caches)
        torch.testing.assert_close(logits, whole[:, t])
        assert past_bytes(caches) == size
    # Caches are values: an earlier one can be gone on from again.
    again, _ = model.step(tokens[:, 30], kept)
    torch.testing.assert_close(again, whole[:, 30])


def test_transnormer_llm_is_configured_as_published():
    model = transnormer_llm(vocab=VOCAB, dim=64, heads=2, depth=3, hidden=40)
    assert model.embed_scale == 8
    assert model.head.weight is not model.embed.weight
    assert [layer.mixer.theta is not None for layer in model.layers] == [True, False, False]
    assert not [name for name, _ in model.named_parameters() if "bias" in name or "norm" in name]
    for layer in model.layers:
        assert layer.mixer.qkvu.weight.std().item() == pytest.approx(0.02, rel=0.1)
    layers = 3 * (5 * 64 * 64 + 3 * 64 * 40) + 64
    assert sum(p.numel() for p in model.parameters()) == 2 * VOCAB * 64 + layers
    x = model.embed.weight[3] * 8
    for layer in model.layers:
        x = layer.prefill(x.view(1, 1, 64))[0]
    x = x / x.square().mean().sqrt()
    torch.testing.assert_close(model(torch.tensor([[3]])), x @ model.head.weight.mT)


def test_sequences_may_be_longer_than_the_context_without_positions():
    model = build(positions=False, context=8)
    tokens = ids(30)
    whole = model(tokens)
    assert model.generate(tokens, 20).shape == (2, 50)
    assert whole.shape == (2, 30, VOCAB)
    bounded = build(context=8)
    for call in (lambda: bounded(tokens), lambda: bounded.prefill(tokens)):
        with pytest.raises(ArgumentError, match="tokens: expected at most 8 tokens"):
            call()
    _, caches = bounded.prefill(tokens[:, :8])
    with pytest.raises(ArgumentError, match="tokens: expected at most 8 tokens"):
        bounded.step(tokens[:, 8], caches)
    with pytest.raises(ArgumentError, match="count: expected at most 4"):
        bounded.generate(tokens[:, :5], 5)
    assert bounded.generate(tokens[:, :5], 4).shape == (2, 9)


def test_states_stay_and_keys_grow():
    sizes = {}
    for key in ("lightning_attention", "full_attention"):
        model = build(key)
        _, caches = model.prefill(ids(10))
        before = past_bytes(caches)
        assert isinstance(caches.layers[0], State if key == "lightning_attention" else Past)
        _, caches = model.prefill(ids(10), caches)
        sizes[key] = past_bytes(caches) / before
    assert sizes == {"lightning_attention": 1, "full_attention": 2}


def test_sampling_is_fixed_by_its_generator():
    model, prompt = build(), ids(5)

    def text(seed):
        return model.generate(prompt, 12, generator=torch.Generator().manual_seed(seed), top_p=0.95)

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))
    assert torch.equal(text(1)[:, :5], prompt)


@pytest.mark.parametrize("key", ["lightning_attention", "full_attention"])
def test_both_methods_sample_the_same(key):
    model, prompt = build(key), ids(5)
    made = [
        model.generate(prompt, 12, method=method, generator=torch.Generator().manual_seed(0), top_k=5)
        for method in ("steps", "whole")
    ]
    assert torch.equal(*made)


def test_greedy_text_is_the_most_likely_at_every_step():
    model, prompt = build(), ids(4)
    made = model.generate(prompt, 6, temperature=0)
    assert torch.equal(model(made)[:, 3:-1].argmax(-1), made[:, 4:])


def test_rows_end_at_the_stop_token():
    model = build(positions=False)
    with torch.no_grad():
        model.head.weight.zero_()
    made = model.generate(ids(2, b=3), 200, stop=4, generator=torch.Generator().manual_seed(0))
    assert 10 < made.shape[1] < 202
    for row in made[:, 2:].tolist():
        first = row.index(4)
        assert all(token == 4 for token in row[first:])
    assert model.generate(ids(3), 0).shape == (2, 3)


@pytest.mark.parametrize("key", CAUSAL)
def test_every_causal_mechanism_writes_text_one_way_or_the_other(key):
    model = build(key, dtype=torch.float32, depth=1)
    prompt = ids(3)
    if model.undecodable():
        with pytest.raises(UnsupportedError, match="method='whole'"):
            model.generate(prompt, 3)
        with pytest.raises(UnsupportedError, match=model.undecodable()[0]):
            model.prefill(prompt)
    method = "whole" if model.undecodable() else "steps"
    made = model.generate(prompt, 3, method=method, temperature=0)
    assert made.shape == (2, 6)


def test_mechanisms_of_ones_own_and_layers_given():
    model = language_model(Dense, vocab=VOCAB, context=12, dim=16, heads=2, depth=2).eval()
    assert model.undecodable() == {0: "Dense", 1: "Dense"}
    made = model.generate(ids(4), 5, method="whole", temperature=0)
    assert torch.equal(model(made)[:, 3:-1].argmax(-1), made[:, 4:])
    with pytest.raises(ArgumentError, match="count: expected at most 9"):
        model.generate(ids(4), 10, method="whole")
    layers = [DecoderLayer(Dense(dim=16, grid=None, heads=2, causal=True), dim=16)]
    free = LanguageModel(vocab=VOCAB, dim=16, layers=layers)
    assert free.generate(ids(4), 30, method="whole").shape == (2, 34)


def test_a_prefill_that_cannot_go_on_says_so():
    model, tokens = build("seer_attention"), ids(6)
    _, caches = model.prefill(tokens)
    with pytest.raises(UnsupportedError, match=r"SeerAttention\.prefill takes no past"):
        model.prefill(tokens, caches)


def test_what_cannot_be_causal_is_refused_with_its_reason():
    with pytest.raises(ArgumentError, match="causal"):
        language_model("swin", vocab=5, context=64)


def test_seeds_fix_everything_and_leave_the_users_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        language_model("full_attention", vocab=5, context=8, dim=8, heads=2, depth=1, seed=s).state_dict()
        for s in (1, 1, 2)
    )
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    transnormer_llm(vocab=5, dim=8, heads=2, depth=1, hidden=8)
    assert torch.equal(torch.rand(3), expected)


def test_tied_heads_share_their_weights():
    tied, free = build(), build(tied=False)
    assert tied.head.weight is tied.embed.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == VOCAB * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(2, 3)), "tokens: expected integers"),
        (lambda m: m(torch.zeros(3, dtype=torch.long)), "tokens: expected integers"),
        (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), "tokens: expected integers"),
        (lambda m: m(torch.full((1, 2), VOCAB)), "tokens: expected ids from 0 to 10, got 11"),
        (lambda m: m.step(torch.zeros(1, 1, dtype=torch.long)), "token: expected"),
        (lambda m: m.generate(ids(3), -1), "count: expected"),
        (lambda m: m.generate(ids(3), 1, method="fast"), "method: expected"),
        (lambda m: m.generate(ids(3), 1, top_p=2.0), "top_p: expected"),
        (lambda m: m.prefill(ids(3), build(depth=1).prefill(ids(3))[1]), "caches: expected 2 layers"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(build())
    with pytest.raises(ArgumentError, match="context: expected"):
        LanguageModel(vocab=3, dim=4, layers=[], positions=True)


@pytest.mark.parametrize("kind", ["registered", "transnormer_llm"])
def test_a_little_training_on_the_documentation_beats_character_frequencies(kind):
    task = TextWorkload(length=64, test_size=2)
    vocab = task.spec.in_features
    if kind == "registered":
        model = language_model("lightning_attention", vocab=vocab, context=64, dim=32, depth=2)
    else:
        model = transnormer_llm(vocab=vocab, dim=32, heads=4, depth=2, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        batch = task.batch(step, size=8)
        loss = cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    assert losses[0] == pytest.approx(math.log2(vocab), rel=0.1)
    assert sum(losses[-20:]) / 20 < task.trivial()["unigram"] - 0.3
