"""Which adapters are in force while a model is judged: those of the whole model always, a repair with the plan that it
was fitted for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap.errors import MismatchError
from reap.files.atomic import write
from reap.gguf.adapter import Adapter, check_fits, read_adapter, spread_adapter
from reap.gguf.model_info import ModelInfo
from reap.gguf.reader import GGUFModel
from reap.scores.identity import compare_records, require_same

if TYPE_CHECKING:
    from reap import _core
    from reap.scores.plan import PrunePlan


class Adapters:
    """The adapters that a model is opened with.

    One that has as many experts as the model is part of it, whatever plan is tried. A repair has as many as the pruned
    model that it was fitted for: it is in force while a plan with the same experts is.
    """

    def __init__(self, session: _core.Session, info: ModelInfo, paths: Sequence[str], *, allow_mismatch: bool) -> None:
        """Read them.

        Raises UsageError and FormatError where one cannot be read, MismatchError where it is of another model.
        """
        self._session, self._info, self._allow_mismatch = session, info, allow_mismatch
        self._own: list[Path] = []
        self._of_plans: list[Adapter] = []
        with GGUFModel.open(info.path) as model:
            for path in paths:
                adapter = read_adapter(path)
                if adapter.n_experts in (None, info.n_experts):
                    check_fits(adapter, model)
                    self._check_model(adapter)
                    self._own.append(adapter.path)
                else:
                    self._of_plans.append(adapter)
        self._in_force: list[Path] = []

    def _check_model(self, adapter: Adapter) -> None:
        if adapter.model is not None:
            names = (str(adapter.path), str(self._info.path))
            verdict = compare_records(adapter.model, self._info.record(), names)
            what = f"{adapter.path} is a repair of a model other than {self._info.path}"
            require_same(verdict, what, allow_mismatch=self._allow_mismatch)

    def apply(self, plan: PrunePlan | None) -> None:
        """Put into force what belongs to the model with the experts that `plan` keeps (None: all).

        Raises MismatchError where a repair is of other experts.
        """
        kept = None if plan is None else plan.layers
        for adapter in self._of_plans:
            if plan is None:
                raise MismatchError(
                    f"{adapter.path} is of a model with {adapter.n_experts} experts, but {self._info.path} has"
                    f" {self._info.n_experts}; it can be judged with that pruned model, or with the plan that made it"
                )
            self._check_kept(adapter, plan)
        self._set(kept)

    def apply_own(self) -> None:
        """Put into force what belongs to the whole model: for what candidates are compared with."""
        self._set(None)

    def _check_kept(self, adapter: Adapter, plan: PrunePlan) -> None:
        said = adapter.metadata.get("reap.repair.kept")
        if said is None:
            return
        fitted = {int(layer): tuple(ids) for layer, ids in json.loads(said).items()}
        layers = [layer for layer, ids in fitted.items() if tuple(plan.layers.get(layer, ())) != ids]
        if layers and not self._allow_mismatch:
            raise MismatchError(
                f"{adapter.path} was fitted to other experts than the plan keeps, in the layers"
                f" {', '.join(map(str, layers))}"
            )

    def _set(self, kept: Mapping[int, Sequence[int]] | None) -> None:
        wanted = list(self._own)
        if kept is None or not self._of_plans:
            if wanted != self._in_force:
                self._session.set_adapters(wanted)
            self._in_force = wanted
            return
        with tempfile.TemporaryDirectory(prefix="reap-adapter-") as folder:
            for index, adapter in enumerate(self._of_plans):
                spread = Path(folder, f"{index}.gguf")
                write(spread, spread_adapter(adapter.path, kept, self._info.n_experts))
                wanted.append(spread)
            self._session.set_adapters(wanted)  # which reads them whole
        self._in_force = wanted
