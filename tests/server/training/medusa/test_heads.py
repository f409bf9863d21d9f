"""The loss, and heads that learn what can be learned from a hidden state."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from perseid_server.training.medusa.accuracy import judge
from perseid_server.training.medusa.config import HeadsOptions
from perseid_server.training.medusa.frozen_loss import Teacher, frozen_cross_entropy
from perseid_server.training.medusa.heads import HeadsTrainer, MedusaHeads
from perseid_server.training.medusa.positions import NOT_DRAFTED, PAST_END, Positions

VOCABULARY, HIDDEN, LENGTH = 12, 32, 40
OPTIONS = HeadsOptions(num_heads=2, batch=64, learning_rate=3e-2, seed=3)


@pytest.fixture(scope="module")
def toy():
    """Answers that count on, token t being t % VOCABULARY: what comes is a function of the hidden state."""
    generator = torch.Generator().manual_seed(0)
    lm_head = torch.randn((VOCABULARY, HIDDEN), generator=generator)
    starts = torch.randint(0, VOCABULARY, (12,), generator=generator).tolist()
    answers = [torch.arange(start, start + LENGTH + 3) % VOCABULARY for start in starts]
    noise = torch.randn((len(answers), LENGTH, HIDDEN), generator=generator)
    hidden = torch.stack([lm_head[answer[:LENGTH]] for answer in answers]) + 0.1 * noise
    targets = torch.stack([torch.stack([answer[1 : LENGTH + 1], answer[2 : LENGTH + 2]], 1) for answer in answers])
    rows = tuple(range(0, len(answers) * LENGTH + 1, LENGTH))
    sources = ("base",) * len(answers)
    return Positions(hidden.flatten(0, 1).half(), targets.flatten(0, 1), rows, sources), lm_head


def test_the_loss_and_its_gradient_are_those_of_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((7, HIDDEN), generator=generator)
    weight = torch.randn((VOCABULARY, HIDDEN), generator=generator)
    targets = torch.tensor([0, 3, PAST_END, 11, NOT_DRAFTED, 3, 5])
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    loss = frozen_cross_entropy(ours, weight, targets)
    expected = functional.cross_entropy(theirs @ weight.T, targets.clamp(min=-1), ignore_index=-1)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_teacher_is_learned_from_where_there_is_one():
    """The gradient is that of the cross-entropy to the mixed distribution; the value is told against the tokens."""
    generator = torch.Generator().manual_seed(2)
    x, states = (torch.randn((5, HIDDEN), generator=generator) for _ in range(2))
    weight = torch.randn((VOCABULARY, HIDDEN), generator=generator)
    targets, softness = torch.tensor([0, 3, PAST_END, 11, 5]), torch.tensor([0.9, 0.9, 0.9, 0.0, 0.5])
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    loss = frozen_cross_entropy(ours, weight, targets, Teacher(states, softness))
    known = targets >= 0
    mixed = functional.one_hot(targets.clamp(min=0), VOCABULARY) * (1 - softness)[:, None]
    mixed = mixed + softness[:, None] * (states @ weight.T).softmax(1)
    functional.cross_entropy((theirs @ weight.T)[known], mixed[known]).backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(loss, functional.cross_entropy((x @ weight.T)[known], targets[known]))


def test_what_tells_a_target_is_the_state_before_it(toy):
    """Within its own answer; nothing is known behind the last one."""
    positions, _ = toy
    rows, known = positions.told_by(torch.tensor([0, LENGTH - 3, LENGTH - 2, LENGTH - 1, LENGTH]), 1)
    assert known.tolist() == [True, True, False, False, True]
    assert rows[known].tolist() == [2, LENGTH - 1, LENGTH + 2]


def test_without_a_target_there_is_no_loss():
    x = torch.ones((2, HIDDEN), requires_grad=True)
    loss = frozen_cross_entropy(x, torch.ones((VOCABULARY, HIDDEN)), torch.tensor([PAST_END, NOT_DRAFTED]))
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()


def test_new_heads_say_what_the_base_says(toy):
    positions, lm_head = toy
    heads = MedusaHeads(OPTIONS, HIDDEN, lm_head.device)
    assert all(torch.equal(state, positions.hidden_ME.float()) for state in heads.states(positions.hidden_ME))


def test_a_next_token_that_is_a_function_of_the_state_is_learned(toy):
    positions, lm_head = toy
    trainer = HeadsTrainer(OPTIONS, positions, lm_head, 120)
    before = judge(trainer.heads, positions, lm_head)
    reports = [trainer.step() for _ in range(120)]
    after = judge(trainer.heads, positions, lm_head)
    assert all(last < 0.2 * first for first, last in zip(reports[0].losses, reports[-1].losses, strict=True))
    assert max(of_head[0] for of_head in before.accuracy()) < 0.2
    assert min(of_head[0] for of_head in after.accuracy()) > 0.95
    assert after.tokens_per_step(2)["base"] > 2.5 > 1.5 > before.tokens_per_step(2)["base"]


def test_a_trainer_goes_on_bit_by_bit(toy):
    positions, lm_head = toy
    whole, first, second = (HeadsTrainer(OPTIONS, positions, lm_head, 20) for _ in range(3))
    for _ in range(20):
        whole.step()
    for _ in range(9):
        first.step()
    second.load_state(first.state())
    while second.step_number < 20:
        second.step()
    for one, same in zip(whole.heads.parameters, second.heads.parameters, strict=True):
        assert torch.equal(one, same)


def test_every_round_takes_every_position_once(toy):
    positions, lm_head = toy
    trainer = HeadsTrainer(replace(OPTIONS, batch=60), positions, lm_head, 16)
    rounds = [torch.cat([trainer._chosen(step) for step in steps]).tolist() for steps in (range(8), range(8, 16))]
    assert rounds[0] != rounds[1]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(len(positions)))


def test_targets_outside_the_vocabulary_are_misses_and_those_past_the_end_do_not_count(toy):
    _, lm_head = toy
    targets = torch.tensor([[0, 1], [NOT_DRAFTED, 2], [3, PAST_END]])
    hidden = lm_head[[0, 1, 3]].half()
    some = Positions(hidden, targets, (0, 3), ("base",))
    judged = judge(MedusaHeads(OPTIONS, HIDDEN, lm_head.device), some, lm_head)
    head0, head1 = judged.accuracy()
    assert head0[0] == pytest.approx(2 / 3)
    assert sum(head1) == pytest.approx(1.0)  # both targets are among ten of twelve candidates
    assert judged.right_MH[1, 0] == judged.right_MH[2, 1] == -1
