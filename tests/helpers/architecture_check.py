"""Everything that is asked of one architecture, in a process of its own: a failed assertion in llama.cpp aborts the
process.

python architecture_check.py NAME DIRECTORY        prints one JSON document: an Outcome
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from helpers.architectures import GROUPED, N_EXPERTS, REFUSED, WITH_PREDICTION, cut, write_model
from helpers.graph_oracle import Experts, Nodes, Routing, Sums, dump, group_gap, read_routing, read_tensors
from helpers.llama_tools import find_tool
from helpers.paths import TESTS

SAMPLE_TOKENS = 16
N_CANDIDATES = 16
LEAST_GAP = 1e-3
#: Ways of running the same tokens: (batch_size, ubatch_size).
WAYS = ((128, 128), (16, 5), (5, 5), (2, 2))
#: One thread: threads that wait for each other are slow on a busy machine, and these models are small.
ENGINE: dict[str, Any] = {"ctx_size": 128, "threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn": "off"}


@dataclass
class Outcome:
    """What became of one architecture. Each stage is True, False with a line in `problems`, or None where it was not
    reached."""

    name: str
    profiles: bool | None = (
        None  # every layer has statistics, finite and positive where there are counts; no way of running differs
    )
    exact: bool | None = None  # counts equal to those of the graph's own nodes, sums to 1e-5
    loads_pruned: bool | None = None  # half the experts removed, the file's tensors as expected, finite logits
    as_removed: bool | None = None  # those logits equal the whole model's with the same experts never selected
    virtual: bool | None = (
        None  # those logits equal the whole model's in a session told to keep the same experts, however batches are cut
    )
    refusal: str = ""  # UnsupportedModelError's sentence, of profile() and of prune()
    n_layers: int = 0
    n_tokens: int = 0
    worst: dict[str, float] = field(default_factory=dict)  # largest relative difference, by what was compared
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        stages = (self.profiles, self.exact, self.loads_pruned, self.as_removed, self.virtual)
        return all(stage is True for stage in stages) and not self.problems


def check(name: str, parent: Path) -> Outcome:
    """Run the checks in a process of their own; what its death says goes to `problems`."""
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        command = [sys.executable, "-m", "helpers.architecture_check", name, directory]
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return Outcome(name, problems=[f"the process ended with {done.returncode}: {done.stderr[-1500:]}"])
    return Outcome(**json.loads(lines[-1]))


class _Check:
    def __init__(self, name: str, directory: Path) -> None:
        self.outcome = Outcome(name)
        self.directory = directory
        program, self.dump_program = find_tool("test-llama-archs"), find_tool("reap-dump-nodes")
        assert program is not None
        assert self.dump_program is not None
        self.gate_first = name == "llama4"
        self.groups = GROUPED.get(name.removesuffix(WITH_PREDICTION))
        self.model = write_model(program, name, directory)
        self.tensors = read_tensors(self.model)
        self.experts = Experts(self.tensors)
        self.outcome.n_layers = len(self.experts.layers)
        self.prediction_layer = self.experts.layers[-1] if name.endswith(WITH_PREDICTION) else None
        self.samples: list[list[int]] = []

    def run(self) -> Outcome:
        from reap import UnsupportedModelError

        try:
            sums = self.measure()
            profile = self.profile()
            self.compare(profile, sums)
            self.prune(profile)
            if self.outcome.name in REFUSED:
                self.problem("was not refused")
        except UnsupportedModelError as error:
            self.outcome.refusal = str(error)
        except Exception as error:
            self.problem(f"{type(error).__name__}: {error}")
        return self.outcome

    def problem(self, text: str) -> bool:
        self.outcome.problems.append(text)
        return False

    def agree(self, what: str, found: Any, expected: Any, tolerance: float) -> bool:
        """Compare arrays by the largest difference, relative to the largest value; remember the worst."""
        difference = float(
            np.abs(np.asarray(found, np.float64) - expected).max() / max(float(np.abs(expected).max()), 1e-30)
        )
        self.outcome.worst[what] = max(difference, self.outcome.worst.get(what, 0.0))
        return difference <= tolerance or self.problem(f"{what}: {difference:.2e} off, allowed {tolerance:.0e}")

    # ---- the graph's own values

    def measure(self) -> dict[int, Sums]:
        """Choose samples whose routing does not depend on luck, and add up their nodes."""
        rng = np.random.default_rng(0)
        candidates = rng.integers(0, 100, (N_CANDIDATES, SAMPLE_TOKENS)).tolist()
        assert self.dump_program is not None
        if self.outcome.name in REFUSED:
            self.samples = candidates
            return {}
        sums = {layer: Sums(N_EXPERTS) for layer in self.experts.layers}
        dumped = dump(
            self.dump_program, self.model, candidates, self.directory, prediction=self.prediction_layer is not None
        )
        for tokens, nodes in zip(candidates, dumped, strict=True):
            routings = {layer: self.routing(nodes, layer) for layer in sums}
            if min(self.gap(nodes, layer, routing) for layer, routing in routings.items()) < LEAST_GAP:
                continue
            self.samples.append(tokens)
            for layer, routing in routings.items():
                self.check_nodes(layer, routing)
                sums[layer].add(routing.without_first() if layer == self.prediction_layer else routing)
        self.outcome.n_tokens = SAMPLE_TOKENS * len(self.samples)
        if len(self.samples) < 4:
            self.problem(f"only {len(self.samples)} of {N_CANDIDATES} samples have a clear routing")
        return sums

    def routing(self, nodes: Nodes, layer: int) -> Routing:
        return read_routing(nodes, layer, SAMPLE_TOKENS, self.gate_first)

    def gap(self, nodes: Nodes, layer: int, routing: Routing) -> float:
        return min(routing.gap, group_gap(nodes, layer, SAMPLE_TOKENS, *self.groups) if self.groups else np.inf)

    def check_nodes(self, layer: int, routing: Routing) -> None:
        """The values are what the sums take them for."""
        if not routing.follows_scores:
            self.problem(f"layer {layer}: the selected experts are not those with the highest scores")
        self.agree("output", self.experts.outputs(layer, routing), routing.outputs, 1e-4)
        if routing.weighted is not None:
            self.agree("weighted", routing.gates[..., None] * routing.outputs, routing.weighted, 1e-5)

    # ---- reap's

    def profile(self) -> Any:
        import reap

        lines = [{"tokens": tokens} for tokens in self.samples]
        profiles = [
            reap.profile(self.model, lines, batch_size=batch, ubatch_size=ubatch, **ENGINE) for batch, ubatch in WAYS
        ]
        first = profiles[0]
        ok = first.layers.tolist() == self.experts.layers or self.problem(
            f"layers {first.layers}, expected {self.experts.layers}"
        )
        used = reap.inspect(self.model).n_experts_used
        unseen = [len(self.samples) if layer == self.prediction_layer else 0 for layer in self.experts.layers]
        expected = used * (self.outcome.n_tokens - np.array(unseen))
        scores = first.score("reap")
        ok &= bool((first.counts.sum(axis=1) == expected).all()) or self.problem(
            f"counts add up to {first.counts.sum(axis=1)}"
        )
        ok &= bool((np.isfinite(scores) == (first.counts > 0)).all()) or self.problem(
            "REAP is not finite where there are counts"
        )
        ok &= bool((scores[first.counts > 0] > 0).all()) or self.problem("REAP is not positive where there are counts")
        for (batch, ubatch), other in zip(WAYS[1:], profiles[1:], strict=True):
            same = bool((other.counts == first.counts).all())
            ok &= same or self.problem(f"counts differ with batches of {batch} and ubatches of {ubatch}")
            ok &= self.agree("batches", other.gated_norm_sum, first.gated_norm_sum, 1e-4)
        self.outcome.profiles = ok
        return first

    def compare(self, profile: Any, sums: dict[int, Sums]) -> None:
        ok = True
        for row, layer in enumerate(self.experts.layers):
            for name, expected in sums[layer].arrays.items():
                found = getattr(profile, name)[row]
                if name == "counts":
                    ok &= bool((found == expected).all()) or self.problem(
                        f"layer {layer}: counts {found}, the graph says {expected}"
                    )
                else:
                    ok &= self.agree(name, found, expected, 1e-5)
        self.outcome.exact = ok

    def prune(self, profile: Any) -> None:
        import reap
        from reap.engine.options import EngineOptions
        from reap.engine.session import open_session

        smaller = self.directory / "smaller.gguf"
        plan = reap.plan(profile, keep=N_EXPERTS // 2)
        reap.prune(self.model, smaller, plan)
        kept = {layer: list(plan.layers[layer]) for layer in self.experts.layers}
        expected, tensors = cut(self.tensors, kept), read_tensors(smaller)
        ok = tensors.keys() == expected.keys() or self.problem("the pruned file has other tensors")
        for name in expected:
            ok &= np.array_equal(tensors[name], expected[name]) or self.problem(f"{name} is not what was to be kept")
        session = open_session(smaller, EngineOptions(**ENGINE))
        found = [session.logits(np.array(tokens, dtype=np.int32), 0) for tokens in self.samples[:4]]
        ok &= bool(np.isfinite(found).all()) or self.problem("the pruned model's logits are not finite")
        again = reap.profile(smaller, [{"tokens": self.samples[0]}], **ENGINE)
        ok &= bool((again.counts.sum(axis=1) > 0).all()) or self.problem("not every layer of the pruned model runs")
        self.outcome.loads_pruned = ok
        self.outcome.as_removed = self.compare_removed(kept, found)
        self.outcome.virtual = self.compare_virtual(kept, found)

    def compare_virtual(self, kept: dict[int, list[int]], found: list[Any]) -> bool:
        from reap.engine.options import EngineOptions
        from reap.engine.session import open_session

        mine = {
            layer: ids for layer, ids in kept.items() if layer != self.prediction_layer
        }  # that block does not run here
        ok = True
        for batch, ubatch in WAYS:
            session = open_session(self.model, EngineOptions(**ENGINE, batch_size=batch, ubatch_size=ubatch))
            tokens = [np.array(sample, dtype=np.int32) for sample in self.samples[: len(found)]]
            whole = session.logits(tokens[0], 0)
            session.set_kept(mine)
            for sample, logits in zip(tokens, found, strict=True):
                ok &= self.agree("virtual", session.logits(sample, 0), logits, 1e-5)
                # graphs drop the tokens whose logits are not wanted before the last layer, which then sees fewer tokens
                ok &= self.agree(
                    "virtual", session.logits(sample, SAMPLE_TOKENS // 2), logits[SAMPLE_TOKENS // 2 :], 1e-5
                )
            session.forward(
                tokens[0][:batch], False
            )  # one wanted token of a batch, of which there may be several ubatches
            session.set_kept(None)
            ok &= bool((session.logits(tokens[0], 0) == whole).all()) or self.problem(
                "a mask that was lifted left something behind"
            )
        return ok

    def compare_removed(self, kept: dict[int, list[int]], found: list[Any]) -> bool:
        removed = {layer: [expert for expert in range(N_EXPERTS) if expert not in ids] for layer, ids in kept.items()}
        assert self.dump_program is not None
        virtual = dump(self.dump_program, self.model, self.samples[:4], self.directory, removed=removed)
        ok = True
        for nodes, logits in zip(virtual, found, strict=True):
            for layer, ids in kept.items():
                if layer == self.prediction_layer:
                    continue  # the logits do not depend on it
                selected = nodes[f"ffn_moe_topk-{layer}"]
                ok &= bool(np.isin(selected, ids).all()) or self.problem(
                    f"layer {layer}: removed experts were selected all the same"
                )
            ok &= self.agree("logits", logits, nodes["logits"].reshape(logits.shape), 1e-5)
        return ok


if __name__ == "__main__":
    print(json.dumps(asdict(_Check(sys.argv[1], Path(sys.argv[2])).run())))
