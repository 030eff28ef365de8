"The checks of annotations that run in all other tests: what they refuse, and that they are at work."

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor
from type_checks import check_calls

from ebt_nb.training.losses import cross_entropy

check = check_calls(typechecker=None)


@check
def multiply(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return a @ b if a.shape[0] < 9 else a


@check
def halve(number: float, times: int = 1) -> float:
    return "none" if times < 0 else number if times == 0 else halve(number / 2, times - 1)


def make_scale(factor):
    "Return a function that is defined anew by every call."

    @check
    def scale(x: Float[Tensor, "rows width"], depth: int = 0) -> Float[Tensor, "rows width"]:
        if depth:
            return make_scale(2 * factor)(x, depth - 1)
        return x * factor if factor else x.sum(0, keepdim=True)

    return scale


def test_axes_have_one_size_in_a_call():
    assert multiply(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert multiply(torch.ones(5, 6), torch.ones(6, 7)).shape == (5, 7)
    with pytest.raises(BeartypeCallHintViolation):
        multiply(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(BeartypeCallHintViolation):
        multiply(torch.ones(9, 3), torch.ones(3, 4))


def test_parameters_and_results_have_their_types():
    assert halve(8, 3) == 1.0
    for arguments in (("8",), (8, 0.5), (8.0, -1)):
        with pytest.raises(BeartypeCallHintViolation):
            halve(*arguments)


def test_a_function_within_a_function_is_checked_each_time_it_is_defined():
    x = torch.ones(3, 2)
    for factor in (1, 2, 3):
        assert torch.equal(make_scale(factor)(x), x * factor)
        with pytest.raises(BeartypeCallHintViolation):
            make_scale(factor)(torch.ones(3))
        assert torch.equal(make_scale(factor)(x, depth=2), 4 * factor * x)
    with pytest.raises(BeartypeCallHintViolation):
        make_scale(0)(x)


def test_the_package_is_checked():
    with pytest.raises(BeartypeCallHintViolation):
        cross_entropy(torch.ones(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
