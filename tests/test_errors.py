import pytest

from mlx_wan.errors import CheckpointError, UserError, WanError


def test_user_mistakes_exit_with_2_and_failures_with_1():
    assert (UserError.exit_code, CheckpointError.exit_code, WanError.exit_code) == (2, 1, 1)


@pytest.mark.parametrize(("error", "caught_as"), [(UserError, ValueError), (CheckpointError, WanError)])
def test_library_users_catch_the_ordinary_class(error, caught_as):
    with pytest.raises(caught_as, match="what happened"):
        raise error("what happened")


def test_a_damaged_file_is_not_a_user_mistake():
    assert not issubclass(CheckpointError, UserError)
