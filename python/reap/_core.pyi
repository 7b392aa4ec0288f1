"""The native core: llama.cpp with a collector in its graph. Import it through `reap.engine.native` only."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Path = str | bytes | os.PathLike[str]  # given; read back as str, with surrogates for what is not UTF-8

__llama_cpp_commit__: str

def rpc_servers() -> list[str]:
    """ "host:port" of the servers that sessions of this process have added."""

def devices(answering: list[str]) -> list[dict[str, Any]]:
    """Of this machine, and of the RPC servers that are known to answer: to ask one that is gone ends the process.

    name, description, kind ("cpu", "gpu", "igpu", "accel"), buffer_type: str; free_bytes, total_bytes: int."""

def backends() -> list[dict[str, Any]]:
    """name ("CPU", "CUDA", "RPC", ...), library (the file it was loaded from): str; n_devices: int."""

def load_backends(folder: _Path) -> None:
    """Load the backends that are modules of their own from a folder; nothing where they are linked. Raises
    `reap.errors.EngineError` where none of the CPU backends runs on this processor."""

def serve_rpc(endpoint: str, threads: int) -> None:
    """Serve this machine's devices over llama.cpp's RPC protocol; returns only where that fails at once."""

def kv_cache_types() -> list[str]:
    """Names that `SessionOptions.type_k` and `type_v` may have."""

def quantize_types() -> dict[str, int]:
    """Names that `QuantizeOptions.type` may have -> llama.cpp's number of the file type."""

def tensor_types() -> list[str]:
    """Names of ggml types that a tensor may be given."""

def quantized_size(options: QuantizeOptions) -> float:
    """Bytes of the output's tensors, exact to a hundredth of a MiB; writes nothing. Raises as `quantize`."""

def quantize(options: QuantizeOptions, progress: Callable[[int, int], object]) -> dict[str, Any]:
    """Write `options.output`. progress: (tensors begun, tensors in all). Nothing stops it but the end of its process.

    fallbacks: list[tuple[str, str, str]], the tensors whose shape does not allow the type that they should have got,
    that type, and the one they got instead (names of `tensor_types`).

    Raises `reap.errors.EngineError` with the end of llama.cpp's log, `reap.errors.UsageError` for a type it does not
    know.
    """

class QuantizeOptions:
    """What a GGUF file becomes. Strings are empty and lists too where nothing was asked."""

    @property
    def input(self) -> str: ...  # the first file of a split model
    @input.setter
    def input(self, value: _Path) -> None: ...
    @property
    def output(self) -> str: ...
    @output.setter
    def output(self, value: _Path) -> None: ...
    type: str  # a name of `quantize_types`
    threads: int  # 0: as many as the machine has
    allow_requantize: bool
    pure: bool  # every matrix gets the type itself, and no mixture
    quantize_output: bool
    output_tensor_type: str  # a name of `tensor_types`
    token_embedding_type: str
    tensor_types: list[tuple[str, str]]  # (regular expression of names, ggml type)
    metadata: list[tuple[str, str | bytes | int]]  # keys to add to the output
    def __init__(self) -> None: ...
    def set_imatrix(self, name: str, values: NDArray[np.float32]) -> None:
        """The importance of each column of a weight: float32 [n_matrices * n_in]."""

class SessionOptions:
    """What a `Session` is opened with; every field has the engine's own default where 0 or an empty value allows it.

    What cannot be is a `reap.errors.UsageError` when the session is opened, and never the end of the process.
    """

    @property
    def model_path(self) -> str: ...
    @model_path.setter
    def model_path(self, value: _Path) -> None: ...
    model_bytes: int  # of its files, which are mapped; 0 where they were not counted
    ctx_size: int  # tokens of one sequence; 0: the model's own
    batch_size: int  # tokens of one decode; n_batch = n_ubatch unless set apart
    ubatch_size: int
    n_sequences: int  # sequences that share one batch
    cache_size: int  # tokens that several sequences together have room for; 0: of a window and a batch
    threads: int  # 0: as many as the machine has cores; at most 512
    gpu_layers: int  # negative: all
    devices: list[str]
    override_tensors: list[tuple[str, str]]  # (regular expression of tensor names, buffer type's name)
    # (key of the model's metadata, "int", "float", "bool" or "str", value); key and value of at most 127 bytes
    kv_overrides: list[tuple[str, str, str]]
    rpc: list[str]  # "host:port"
    @property
    def adapters(self) -> list[str]: ...  # LoRA adapters, each in full force
    @adapters.setter
    def adapters(self, value: Iterable[_Path]) -> None: ...

    type_k: str  # a name of `kv_cache_types`
    type_v: str
    flash_attn: str  # "auto", "on" or "off"
    prediction_layer: int  # the multi-token-prediction block with experts that is to be profiled; -1: none
    use_mmap: bool
    repack: bool  # let the CPU backend rearrange weights (AMX and others)
    head_on_host: bool  # keep the output head in host memory: a profile stops before it
    reduce_on_device: bool  # False, for comparison: read whole outputs from devices
    stop_early: bool  # False, for comparison: run the graph to its end
    def __init__(self) -> None: ...

class Vocabulary:
    """A model's tokenizer and chat template alone, none of its tensors: the same names as `Session` has for them.

    Raises `reap.errors.EngineError` with the end of llama.cpp's log.
    """

    def __init__(self, model_path: _Path) -> None: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def add_eos(self) -> bool: ...
    @property
    def bos(self) -> int: ...  # -1: none
    @property
    def eos(self) -> int: ...  # -1: none
    @property
    def chat_template(self) -> str | None: ...  # U+FFFD for what is not UTF-8
    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """As `Session.tokenize`."""

    def token_text(self, token: int) -> bytes: ...
    def ends_generation(self, token: int) -> bool: ...

class Session:
    """A model and a context. Every method that computes releases the GIL and answers Ctrl-C within one layer.

    Raises `reap.errors.EngineError` with the end of llama.cpp's log, `reap.errors.UsageError` for an option it does not
    know.
    """

    def __init__(self, options: SessionOptions) -> None: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def ctx_size(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def ubatch_size(self) -> int: ...
    @property
    def n_sequences(self) -> int: ...
    @property
    def cache_size(self) -> int: ...  # tokens that all sequences together have room for
    @property
    def threads(self) -> int: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def add_eos(self) -> bool: ...
    @property
    def bos(self) -> int: ...  # -1: none
    @property
    def eos(self) -> int: ...  # -1: none
    @property
    def chat_template(self) -> str | None: ...  # U+FFFD for what is not UTF-8
    def warnings(self) -> list[str]:
        """What the engine warned of while this session was opened, and a context beyond training: lines, each once."""

    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Ids int32 [n]. On a stack as large as the text can need, so that no long run ends the process.

        Raises `reap.errors.EngineError` for a text that cannot be tokenised here, `reap.errors.UsageError` where there
        is no tokenizer.
        """

    def token_text(self, token: int) -> bytes: ...
    def start_profile(self, layers: list[int], n_experts: int) -> None:
        """Learn the model's graph from a two-token pass and prepare empty sums. `layers`: the MoE layers of the file,
        ascending."""

    def profile_batch(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        groups: NDArray[np.int32],
    ) -> None:
        """Run one batch (all arrays int32 [n_tokens]) up to the last MoE layer; its saliency waits for `commit`.

        `groups[i]` >= 0 is the group (domain) that token i is counted in, -1 for a token that is not counted. Where a
        batch fails, all that waits is discarded. A batch that begins at position 0 begins anew: the context forgets all
        sequences.
        """

    def forward(self, tokens: NDArray[np.int32], all_logits: bool) -> None:
        """Run one sequence without collecting: all logits, or the last token's alone. What a profile is measured
        against."""

    def commit(self, n_units: int) -> None:
        """Add what waits to the sums and `n_units` to `units`, in one step that no signal can part."""

    def restore(self, group: int, sums: dict[str, NDArray[np.float64] | NDArray[np.int64]], n_units: int) -> None:
        """Go on from the sums of an earlier run, as `sums` gave them, and from its `units`."""

    @property
    def units(self) -> int:
        """Samples committed so far, as the caller counted them."""

    def discard(self) -> None:
        """Forget what waits, and what the context remembers."""

    @property
    def n_groups(self) -> int: ...
    def sums(self, group: int) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """counts int64 and `reap.scores.records.SUMS` float64, each [n_layers, n_experts]; total_tokens int64
        [n_layers]."""

    def collector_stats(self) -> dict[str, float]:
        """seconds in the callback, bytes read by the collector, stops, batches."""

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Logits [n_tokens - first, n_vocab] of the positions from `first` on, in a fresh context."""

    def log_probs(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float64]:
        """ln p(tokens[i + 1] | tokens[..i]) for i = first .. n_tokens - 2, float64 [n_tokens - 1 - first], in a fresh
        context."""

    def predict_top(self, tokens: NDArray[np.int32], first: int, n_top: int) -> dict[str, NDArray[Any]]:
        """What the model predicts at the n = n_tokens - 1 - first positions from `first` on, in a fresh context.

        next: float64 [n], ln p of the token that comes. best: int32 [n], the most probable token. ids: int32 [n, k],
        the k = min(n_top, n_vocab) most probable tokens in no order, or the whole vocabulary in its own. log_probs:
        float32 [n, k], theirs. rest: float64 [n], the probability (no logarithm) of all tokens that are not among them.
        """

    def predict_ids(self, tokens: NDArray[np.int32], first: int, ids: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """The same about the tokens `ids` int32 [n, k]; what it returns has no "ids"."""

    def score_continuations(
        self, questions: list[tuple[NDArray[np.int32], list[NDArray[np.int32]]]]
    ) -> list[list[tuple[float, bool]]]:
        """Of each question (a context int32 [n], continuations int32 [m]) and each of its continuations: ln p of it
        after the context, and whether each of its tokens is the most probable one.

        Contexts are run once; what the cache holds of one is shared by its continuations, of which each is a sequence.
        `UsageError` where they are more than n_sequences, or do not fit the cache together.
        """

    def generate(
        self,
        prompts: list[tuple[NDArray[np.int32], int, int, list[bytes]]],
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> list[tuple[NDArray[np.int32], str]]:
        """What follows each prompt (tokens int32 [n], most new tokens, seed, texts that end it where they appear), all
        of them at once: the new tokens int32 [m], with the one that ended the text, and "length", "text" or "stop".

        llama.cpp's samplers in this order: top_k (0: all tokens), top_p (1), min_p (0), temperature (0: the most
        probable token). `UnsupportedModelError` for a model without a cache (diffusion).
        """

    def ends_generation(self, token: int) -> bool: ...
    def sees_the_future(self) -> bool:
        """Whether what the model says at a position depends on later tokens (diffusion models): tried on 8 tokens."""

    def router_likeness(self) -> dict[int, tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """By layer whose experts are selected by token id, of the tokens that this session committed: how many, and of
        the router's values v Σ v float64 [n_experts] and Σ v·w float64 [n_experts, n_experts]."""

    def set_adapters(self, paths: Iterable[_Path]) -> None:
        """Let LoRA adapters take the place of those in force. Raises `reap.errors.EngineError`; who calls has checked
        that an adapter of experts has as many as the model, which the engine does not."""

    def capture(self, tokens: NDArray[np.int32], layers: list[int], experts: bool) -> dict[int, dict[str, Any]]:
        """Run one sequence as far as the last of `layers`; layer -> what was read.

        stream: float32 [n_tokens, n_embd], the hidden states that the layer hands on. With `experts` also ids: int32
        [n_tokens, n_used], gates: float32 [n_tokens, n_used], inputs: float32 [n_tokens, n_used, n_ff], what enters
        the down projections; gate_before: bool, whether the gate is in the inputs already.

        Raises `reap.errors.UnsupportedModelError` for a graph that does not show them.
        """

    def set_kept(self, kept: dict[int, list[int]] | None, substitutes: dict[int, dict[int, list[int]]] = ...) -> None:
        """From now on run as if each MoE layer (GGUF block index) had only the experts `kept[layer]`; None: all of them
        again.

        substitutes: of each layer whose experts are selected by token id, removed expert -> at least as many kept ones
        as a token has, best first; the first that the token does not have takes the place.
        In force for everything that runs the model. After each batch it is checked that every layer was masked for
        every token. `UnsupportedModelError` for a model whose routing depends on more than its router's values,
        `UsageError` for layers or ids that the model does not have, or fewer experts than a token goes to.
        """
