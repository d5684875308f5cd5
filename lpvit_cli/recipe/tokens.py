"""How many tokens a model merges."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from lpvit_cli.recipe.section import Section


class TokensSection(Section):
    """Similar tokens are merged between blocks: so much that the model needs `flops` of its FLOPs, or `fraction` of the tokens
    each time. Class, register and distillation tokens are left alone. See tokens.md."""

    flops: float | None = Field(default=None, gt=0, lt=1)  # kept fraction of the FLOPs, before anything is pruned
    fraction: float | None = Field(default=None, gt=0, le=0.5)  # of the tokens, that each merge takes away
    after: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # the blocks after which tokens are merged, the first is 0;
    # null: every second one from the first

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.flops is None) == (self.fraction is None):
            raise ValueError("give either flops or fraction")
        if self.after is not None and (not self.after or list(self.after) != sorted(set(self.after))):
            raise ValueError("after: give one block or more, each once and in order")
        return self
