"""Training can be paused, stored, compared; evaluation is of the averaged weights."""

import math
from dataclasses import replace

import pytest
import torch

from foveate.tasks import train as train_module
from foveate.tasks.train import DivergedError, Trainer
from foveate.tasks.workload import generator_for
from tests.tasks.stand_ins import Toy, build


def make(key="dense", seed=0, **recipe):
    toy = Toy()
    toy.recipe = replace(toy.recipe, **recipe)
    return Trainer(toy, lambda spec, seed: build(key, spec, seed=seed), seed=seed)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_steps_in_pieces_are_the_same_steps():
    whole, parts = make(), make()
    whole.advance(6)
    for n in (1, 3, 2):
        parts.advance(n)
    assert torch.equal(weights(whole), weights(parts))
    assert whole.evaluate() == parts.evaluate()


def test_evaluating_changes_nothing():
    once, twice = make(), make()
    for trainer, looks in ((once, 0), (twice, 2)):
        trainer.advance(2)
        for _ in range(looks):
            trainer.evaluate()
        trainer.advance(2)
    assert torch.equal(weights(once), weights(twice))


def test_a_stored_trainer_goes_on_exactly(tmp_path):
    one = make("mean")
    one.advance(3)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    one.advance(3)
    two = make("mean", seed=0)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert two.step == 3
    two.advance(3)
    assert torch.equal(weights(one), weights(two))
    assert one.evaluate() == two.evaluate()


def test_the_average_is_plain_at_first_and_forgets_later(monkeypatch):
    monkeypatch.setattr(train_module, "SHORTEST_MEMORY", 3)
    trainer = make(average=0.1)
    seen = []
    for _ in range(3):
        trainer.advance(1)
        seen.append(weights(trainer))
    average = torch.cat([trainer.average[n].flatten() for n, _ in trainer.model.named_parameters()])
    torch.testing.assert_close(average, sum(seen) / 3)
    trainer.advance(1)
    later = torch.cat([trainer.average[n].flatten() for n, _ in trainer.model.named_parameters()])
    torch.testing.assert_close(later, average * 2 / 3 + weights(trainer) / 3)


def test_data_order_depends_on_seed_and_step_only():
    toy = Toy()
    assert torch.equal(toy.batch(3, seed=1).inputs, toy.batch(3, seed=1).inputs)
    assert not torch.equal(toy.batch(3, seed=1).inputs, toy.batch(4, seed=1).inputs)
    assert not torch.equal(toy.batch(3, seed=1).inputs, toy.batch(3, seed=2).inputs)
    draws = {torch.rand(2, generator=generator_for(a, b)).sum().item() for a in range(20) for b in range(20)}
    assert len(draws) == 400


def test_learning_happens():
    trainer = make("dense", lr=2e-2)
    before = trainer.evaluate().quality
    trainer.advance(60)
    assert trainer.evaluate().quality > max(0.85, before)


def test_divergence_is_an_error_with_the_step():
    with pytest.raises(DivergedError, match="at step 0"):
        make("explode").advance(1)


def test_evaluation_knows_its_error_and_skips_questions_not_asked():
    found = make().workload.evaluate(lambda x: torch.tensor([0.0, 1.0]).expand(len(x), 6, 2))
    targets = torch.cat([b.targets for b in Toy().test_batches(9)]).double()
    assert found.n == 64
    assert found.quality == pytest.approx(targets.mean().item())
    assert found.quality_se == pytest.approx(targets.std().item() / math.sqrt(64))
    assert found.parts == {"half": 1.0}
