# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads a GGUF file with llama.cpp and answers logits.

Over the C API of libllama (include/llama.h), by ctypes. Its structs move between versions and a wrong one is
undefined behaviour: what the library calls its defaults is compared with the known ones before anything else.
"""

import collections
import ctypes
import functools
import importlib.util
import json
import os
import re
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy

REMEDY = "pip install 'lrconvert[llama]'"
SUPPORTED = "llama.cpp 0.5 or 0.6, as in llama-cpp-python 0.3.36 and xllamacpp 2026.10.11549"

BATCH = 512  # tokens a call, llama.cpp's own n_ubatch
KV_TYPES = {"f32": 0, "f16": 1}  # enum ggml_type
GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: GPU and IGPU
MMAP = 1  # enum llama_load_mode
ERROR, DEBUG, CONTINUED = 4, 1, 5  # enum ggml_log_level
LOG_LINES = 200


class Unusable(Exception):
    """The library, not the artifact, is what is wrong."""


# --- structs: names, order and types of include/llama.h of llama.cpp 0.5 and 0.6 ---------------------------
# `later` takes what newer versions append: without it the library would write beyond our memory.


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("later", c_int8 * 128),
    )


def context_params(*added):
    """The struct of a context's parameters, with what a version has added before its flags."""

    class ContextParams(ctypes.Structure):
        _fields_ = (
            ("n_ctx", c_uint32),
            ("n_batch", c_uint32),
            ("n_ubatch", c_uint32),
            ("n_seq_max", c_uint32),
            ("n_rs_seq", c_uint32),
            ("n_outputs_max", c_uint32),
            ("n_outputs_max_per_seq", c_uint32),
            ("n_threads", c_int32),
            ("n_threads_batch", c_int32),
            ("ctx_type", c_int32),
            ("rope_scaling_type", c_int32),
            ("pooling_type", c_int32),
            ("attention_type", c_int32),
            ("flash_attn_type", c_int32),
            ("rope_freq_base", c_float),
            ("rope_freq_scale", c_float),
            ("yarn_ext_factor", c_float),
            ("yarn_attn_factor", c_float),
            ("yarn_beta_fast", c_float),
            ("yarn_beta_slow", c_float),
            ("yarn_orig_ctx", c_uint32),
            ("defrag_thold", c_float),
            ("cb_eval", c_void_p),
            ("cb_eval_user_data", c_void_p),
            ("type_k", c_int32),
            ("type_v", c_int32),
            ("abort_callback", c_void_p),
            ("abort_callback_data", c_void_p),
            *added,
            ("embeddings", c_bool),
            ("offload_kqv", c_bool),
            ("no_perf", c_bool),
            ("op_offload", c_bool),
            ("swa_full", c_bool),
            ("kv_unified", c_bool),
            ("samplers", c_void_p),
            ("n_samplers", c_size_t),
            ("ctx_other", c_void_p),
            ("later", c_int8 * 128),
        )

    return ContextParams


CONTEXT_PARAMS = (context_params(("moe_cache_size", c_size_t)), context_params())  # llama.cpp 0.6, 0.5


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# What the library's own defaults must read as. A field more or less before one of them shifts it; the flags in a
# row of equal ones stand between two that differ.
MODEL_DEFAULTS = {
    "devices": None,
    "tensor_buft_overrides": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "type_k": 1,
    "type_v": 1,
    "abort_callback": None,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}
# Of a batch made for one token: memory behind these, none behind embd.
BATCH_ARRAYS = ("token", "pos", "n_seq_id", "seq_id", "logits")

LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
ABORT_CALLBACK = ctypes.CFUNCTYPE(None, c_char_p)

# name: result, arguments
FUNCTIONS = {
    "llama_log_set": (None, LOG_CALLBACK, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_desc": (c_int32, c_void_p, c_char_p, c_size_t),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_free": (None, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_type": (c_int32, c_void_p),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_free": (None, c_void_p),
    "llama_n_ctx_seq": (c_uint32, c_void_p),
    "llama_n_batch": (c_uint32, c_void_p),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_can_shift": (c_bool, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_memory_seq_add": (None, c_void_p, c_int32, c_int32, c_int32, c_int32),
    "ggml_backend_reg_count": (c_size_t,),
    "ggml_backend_load_all": (None,),
    "ggml_backend_load_all_from_path": (None, c_char_p),
    "ggml_backend_dev_count": (c_size_t,),
    "ggml_backend_dev_get": (c_void_p, c_size_t),
    "ggml_backend_dev_name": (c_char_p, c_void_p),
    "ggml_backend_dev_description": (c_char_p, c_void_p),
    "ggml_backend_dev_type": (c_int32, c_void_p),
    "ggml_set_abort_callback": (ABORT_CALLBACK, ABORT_CALLBACK),
}


def differences(params, expected):
    """Words for every field that does not read as the library's known default."""
    return [
        f"{name} is {getattr(params, name)!r} instead of {value!r}"
        for name, value in expected.items()
        if getattr(params, name) != value
    ]


def batch_differences(batch):
    """The same for a batch that the library made for one token."""
    missing = [f"{name} is NULL" for name in BATCH_ARRAYS if not getattr(batch, name)]
    extra = [f"{name} is set" for name in ("embd", "n_tokens") if getattr(batch, name)]
    return missing + extra


class Library:
    """libllama and ggml: loaded, checked, its functions by name, its last words."""

    def __init__(self, name, files):
        self.name = name
        os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger and bury the reason
        if sys.platform == "win32":
            os.add_dll_directory(str(Path(files[0]).parent))
        try:
            self.loaded = [ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL) for file in files]
        except OSError as error:
            raise Unusable(f"{name} can't be loaded: {error}") from error
        self.version = self.read_version()
        for function, (result, *arguments) in FUNCTIONS.items():
            setattr(self, function, self.typed(function, result, arguments))
        self.listen()
        self.check_layout()
        self.start(str(Path(files[0]).parent))

    def find(self, function):
        # On Windows a library does not answer for those that it depends on.
        return next((getattr(lib, function) for lib in reversed(self.loaded) if hasattr(lib, function)), None)

    def read_version(self):
        """Newer ones say it; an old one is the more likely to need a name in an error."""
        function = self.find("llama_version")
        if function is None:
            return "unknown version"
        function.restype = c_char_p
        return function().decode()

    def typed(self, function, result, arguments):
        found = self.find(function)
        if found is None:
            raise self.unsupported(f"{function} is missing")
        found.restype, found.argtypes = result, arguments
        return found

    def unsupported(self, reason):
        who = f"{self.name} (llama.cpp {self.version})"
        return Unusable(f"{who} is not a supported llama.cpp: {reason}; {SUPPORTED} is needed")

    def listen(self):
        """Keep what llama.cpp logs instead of printing it, and say why before an assertion ends the process."""
        self.lines = collections.deque(maxlen=LOG_LINES)
        # Attributes: the library calls these for as long as the process lives.
        self.on_log, self.on_abort = LOG_CALLBACK(self.log), ABORT_CALLBACK(self.aborted)
        self.llama_log_set(self.on_log, None)
        self.ggml_set_abort_callback(self.on_abort)

    def log(self, level, text, _):
        words = text.decode(errors="replace")
        if level == CONTINUED and self.lines:
            level, before = self.lines.pop()
            self.lines.append((level, before + words))
        elif level != DEBUG:
            self.lines.append((level, words))

    def aborted(self, message):
        words = " ".join(message.decode(errors="replace").split())
        loop.ANSWERS.write(json.dumps({"error": f"llama.cpp aborts: {words}"}) + "\n")
        loop.ANSWERS.flush()

    def errors(self):
        """The last errors that it logged, as one line."""
        lines = [" ".join(text.split()) for level, text in self.lines if level == ERROR]
        return "; ".join(lines[-3:]) or "it gives no reason"

    def check_layout(self):
        found = differences(self.llama_model_default_params(), MODEL_DEFAULTS) + self.choose_context_params()
        if not found:  # where those differ, calling on would be a guess
            batch = self.llama_batch_init(1, 0, 1)
            found = batch_differences(batch)
        if found:
            raise self.unsupported("; ".join(found[:3]))
        self.llama_batch_free(batch)

    def choose_context_params(self):
        """Take the layout in which the library's defaults read right; else the differences from the nearest one."""
        tried = []
        for params in CONTEXT_PARAMS:
            self.llama_context_default_params = self.typed("llama_context_default_params", params, ())
            self.llama_init_from_model = self.typed("llama_init_from_model", c_void_p, (c_void_p, params))
            tried.append(differences(self.llama_context_default_params(), CONTEXT_DEFAULTS))
            if not tried[-1]:
                break
        return min(tried, key=len)

    def start(self, folder):
        self.llama_backend_init()
        # Builds with loadable backends register none until asked, and look beside the Python that runs.
        if not self.ggml_backend_reg_count():
            self.ggml_backend_load_all_from_path(os.fsencode(folder))
        if not self.ggml_backend_reg_count():
            self.ggml_backend_load_all()
        if not self.ggml_backend_reg_count():
            raise Unusable(f"{self.name} has no CPU backend: no libggml-cpu* in {folder} fits this machine")

    def gpus(self):
        """Name and description of every GPU that ggml sees."""
        devices = [self.ggml_backend_dev_get(index) for index in range(self.ggml_backend_dev_count())]
        return {
            self.ggml_backend_dev_name(device).decode(): self.ggml_backend_dev_description(device).decode()
            for device in devices
            if self.ggml_backend_dev_type(device) in GPU_TYPES
        }


@functools.cache  # several artifacts, one after the other; and what the library calls back must not go away
def library_of(name, files):
    return Library(name, files)


class Context:
    """One llama_context with its memory, freed at the end of a `with`."""

    def __init__(self, worker, tokens, *, sequences=1, outputs=1):
        self.lib, self.vocabulary = worker.lib, worker.vocabulary
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * tokens, sequences
        params.n_batch = params.n_ubatch = worker.n_batch
        # How many logits a call can answer: by default memory for n_batch times the vocabulary is taken.
        params.n_outputs_max = max(sequences, min(outputs, worker.n_batch))
        params.n_threads = params.n_threads_batch = worker.threads
        params.type_k = params.type_v = KV_TYPES[worker.kv]
        params.flash_attn_type = 0
        params.offload_kqv = params.op_offload = worker.on_gpu
        params.kv_unified = False  # the set is chosen by the size of a sequence's own context
        self.lib.lines.clear()
        self.context = self.lib.llama_init_from_model(worker.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp can't make a context of {sequences} x {tokens} tokens: {self.lib.errors()}")
        self.n_ctx_seq = self.lib.llama_n_ctx_seq(self.context)
        self.n_batch = self.lib.llama_n_batch(self.context)
        self.batch = self.lib.llama_batch_init(self.n_batch, 0, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)

    def decode(self, entries):
        """Logits of the entries that are wanted, in their order. Each is (token, position, sequence, wanted)."""
        rows = []
        for start in range(0, len(entries), self.n_batch):
            rows += self.decode_one_call(entries[start : start + self.n_batch])
        return rows

    def decode_one_call(self, entries):
        batch = self.batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        self.lib.lines.clear()
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode answers {status}: {self.lib.errors()}")
        return [self.row(index) for index, entry in enumerate(entries) if entry[3]]

    def row(self, index):
        values = self.lib.llama_get_logits_ith(self.context, index)
        return numpy.ctypeslib.as_array(values, (self.vocabulary,)).copy()  # the next call overwrites it

    def forget(self, drop, *, move):
        """Forget the first positions; `move` the others to the start, which is what a full context does."""
        memory = self.lib.llama_get_memory(self.context)
        if not self.lib.llama_memory_seq_rm(memory, 0, 0, drop):
            raise RuntimeError(f"llama.cpp can't forget the first {drop} positions: {self.lib.errors()}")
        if move and not self.lib.llama_memory_can_shift(memory):
            raise RuntimeError("llama.cpp can't shift the context of this architecture")
        if move:
            self.lib.llama_memory_seq_add(memory, 0, drop, -1, -drop)


def check_capacity(needed, context):
    if needed > context.n_ctx_seq:
        raise ValueError(f"{needed} tokens, but the context holds {context.n_ctx_seq}: use a larger one")


def checked_positions(positions, row):
    """Where the row stands. llama.cpp refuses gaps within a sequence; it may start anywhere."""
    if positions is None:
        return range(len(row))
    if len(positions) != len(row):
        raise ValueError(f"{len(positions)} positions for {len(row)} tokens")
    expected = range(positions[0], positions[0] + len(row))
    if positions[0] < 0 or list(expected) != positions:
        raise ValueError("llama.cpp takes consecutive positions only (they may start anywhere), but these have gaps")
    return expected


def entries_of(row, positions, sequence, wanted):
    return [
        (token, position, sequence, index in wanted)
        for index, (token, position) in enumerate(zip(row, positions, strict=True))
    ]


class Worker:
    def __init__(self, request):
        self.folder, self.count = Path(request["folder"]), 0
        if request["gpu_layers"] > 0:
            # cuBLAS reads it when it starts. Float32 products in TF32 would be a thousand times less exact.
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        try:
            self.lib = library_of(request["library"], tuple(request["files"]))
        except Unusable as error:
            self.info = {"unusable": str(error)}
            return
        self.threads, self.kv = request["threads"], request["kv"]
        self.n_batch = request["n_batch"] or BATCH
        self.on_gpu = request["gpu_layers"] > 0
        self.model = self.load(request["artifact"], request["gpu_layers"])
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.vocab)
        self.info = {
            "llama.cpp": f"{self.lib.version} ({self.lib.name})",
            "class": self.description(),
            "device": self.device() if self.on_gpu else "cpu",
            "dtype": request["dtype"],
            "kv": self.kv,
            "n_ctx_train": self.lib.llama_model_n_ctx_train(self.model),
        }

    def __del__(self):
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)

    def load(self, path, gpu_layers):
        params = self.lib.llama_model_default_params()
        params.load_mode, params.n_gpu_layers = MMAP, gpu_layers
        nothing = (c_void_p * 1)()  # an empty list: without it a GPU computes large batches whatever n_gpu_layers says
        if not self.on_gpu:
            params.devices = ctypes.cast(nothing, c_void_p)
        self.lib.lines.clear()
        model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise RuntimeError(f"llama.cpp can't load it: {self.lib.errors()}")
        return model

    def device(self):
        """The GPU that holds the model, by llama.cpp's own log: without one it computes on the CPU and says nothing."""
        text = "".join(text for _, text in self.lib.lines)
        offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", text)
        buffers = re.findall(r"(\S+) model buffer size", text)
        used = [words for name, words in self.lib.gpus().items() if any(is_of(buffer, name) for buffer in buffers)]
        if not used or not offloaded or offloaded[1] != offloaded[2]:
            layers = f"{offloaded[1]} of {offloaded[2]} layers" if offloaded else "no layers"
            raise RuntimeError(
                f"the model runs on the CPU, fully or partly: {layers} are on a GPU, "
                f"weights are in {', '.join(buffers) or 'no buffer'} ({self.lib.name})"
            )
        return ", ".join(used)

    def description(self):
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def save(self, array):
        name = f"{self.count}.npy"
        self.count += 1
        numpy.save(self.folder / name, numpy.asarray(array, dtype=numpy.float32))
        return name

    def logits(self, request):
        """Every row is a sequence of its own, one after the other in the calls."""
        rows, keep = request["rows"], request["keep"]
        if request["positions"] is not None and len(rows) > 1:
            raise ValueError("positions are for a single row")
        longest = max(len(row) for row in rows)
        kept = [sorted({index % len(row) for index in keep}) for row in rows]
        entries = []
        for sequence, row in enumerate(rows):
            entries += entries_of(row, checked_positions(request["positions"], row), sequence, set(kept[sequence]))
        capacity = request.get("context") or longest
        with Context(self, capacity, sequences=len(rows), outputs=sum(map(len, kept))) as context:
            check_capacity(longest, context)
            made = iter(context.decode(entries))
            answers = []
            for row, wanted in zip(rows, kept, strict=True):
                found = {index: next(made) for index in wanted}
                answers.append([found[index % len(row)] for index in keep])
            return {"logits": self.save(answers), "n_ctx_seq": context.n_ctx_seq}

    def generate(self, request):
        """Greedy, a token a call."""
        prompt, count = request["prompt"], request["new_tokens"]
        with Context(self, request.get("context") or len(prompt) + count) as context:
            check_capacity(len(prompt) + count - 1, context)  # what is chosen last is not read
            tokens, rows = [], context.decode(entries_of(prompt, range(len(prompt)), 0, {len(prompt) - 1}))
            for position in range(len(prompt), len(prompt) + count):
                tokens.append(int(rows[-1].argmax()))
                if len(tokens) < count:
                    rows += context.decode([(tokens[-1], position, 0, True)])
            return {"tokens": tokens, "logits": self.save(rows[:count]), "n_ctx_seq": context.n_ctx_seq}

    def shifted(self, request):
        """Logits of forced tokens, a token a call, after the start of the context was forgotten."""
        tokens, drop, more, move = request["tokens"], request["drop"], request["more"], request["move"]
        if not 0 < drop < len(tokens):
            raise ValueError(
                f"{drop} of {len(tokens)} tokens can't be forgotten: at least one must go and one must stay"
            )
        with Context(self, request.get("context") or len(tokens) + len(more)) as context:
            check_capacity(max(len(tokens), len(tokens) - drop + len(more)), context)
            context.decode(entries_of(tokens, range(len(tokens)), 0, ()))
            context.forget(drop, move=move)
            rows = []
            for position, token in enumerate(more, len(tokens) - drop if move else len(tokens)):
                rows += context.decode([(token, position, 0, True)])
            return {"logits": self.save(rows), "n_ctx_seq": context.n_ctx_seq}

    def tokenise(self, request):
        if not self.lib.llama_vocab_type(self.vocab):
            raise ValueError("the file holds no tokenizer")
        return {"tokens": [self.tokens_of(text.encode(), request["add_special"]) for text in request["texts"]]}

    def tokens_of(self, text, add_special):
        capacity = len(text) + 2  # a token a byte, a start and an end
        while True:
            buffer = (c_int32 * capacity)()
            count = self.lib.llama_tokenize(self.vocab, text, len(text), buffer, capacity, add_special, True)
            if count >= 0:
                return list(buffer[:count])
            capacity = -count


def is_of(buffer, device):
    """Whether a buffer ("CUDA0", "CUDA_Host", "CPU_Mapped") lies on the device ("CUDA0") and not on its host."""
    return buffer.startswith(device) and not buffer.endswith("_Host")


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker_loop", Path(__file__).with_name("worker_loop.py"))
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.serve(Worker, REMEDY)
