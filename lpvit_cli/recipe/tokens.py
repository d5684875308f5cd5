"""How many tokens a model merges."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from lpvit_cli.recipe.section import Section


class TokensSection(Section):
    """Similar tokens are merged between blocks: so much that the model needs `flops` of its FLOPs, or `fraction` of the tokens
    each time; `tokens: auto` is as much as is best for prune.budget. Class, register and distillation tokens
    stay. See tokens.md."""

    auto: bool = False  # written as tokens: auto
    flops: float | None = Field(default=None, gt=0, lt=1)  # kept fraction of the FLOPs, before anything is pruned
    fraction: float | None = Field(default=None, gt=0, le=0.5)  # of the tokens, that each merge takes away
    after: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # the blocks after which tokens are merged, the first is 0;
    # null: every second one from the first

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, given: Any) -> Any:
        if given == "auto":
            return {"auto": True}
        if not isinstance(given, dict | TokensSection):
            raise ValueError("should be auto, or {flops: ...} or {fraction: ...}, between 0 and 1")
        return given

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.auto and (self.flops, self.fraction, self.after) != (None, None, None):
            raise ValueError("auto decides on flops, fraction and after: leave them out")
        if not self.auto and (self.flops is None) == (self.fraction is None):
            raise ValueError("give either flops or fraction")
        if self.after is not None and (not self.after or list(self.after) != sorted(set(self.after))):
            raise ValueError("after: give one block or more, each once and in order")
        return self
