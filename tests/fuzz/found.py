"""Random cases that once failed, made smaller."""

from .networks import Spec


def _plain(name: str, **options) -> tuple[str, dict]:
    from .pieces import PIECES

    return name, {key: values[0] for key, values in PIECES[name].choices.items()} | options


FOUND: dict[str, Spec] = {
    # the first run of the checkpoint is observed and moves running statistics, so its result is used; the second had a plan
    "batch statistics in a checkpoint": Spec(
        202, "images", (_plain("Conv"), _plain("Conv")), (("checkpoint", 0.5),), batches=(2, 2)
    ),
    # the fake batch norm of a transposed input has other strides than the real one, and a view was recorded for them
    "batch norm of tokens": Spec(3176, "tokens", (_plain("Mlp", norm="batch"),) * 2, batches=(3,), adapter="lora"),
}
