"""What a step gives for tensors without values."""

from cgo.private.fake_tensors import FakeTensorMode


def assert_fakes_are_alike(step, given):
    """A step of fake tensors gives the shapes, dtypes and strides that it gives of true ones.

    Args:
        step: Called with what `given` makes.
        given: Makes the inputs.
    """
    true = step(*given())
    with FakeTensorMode():
        fake = step(*given())
    for ours, theirs in zip(fake, true, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )
