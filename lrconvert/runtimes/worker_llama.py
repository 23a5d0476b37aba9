# SPDX-License-Identifier: Apache-2.0
"""libllama by ctypes: its structs, its functions, and the check that the library has them.

For llama_cpp_worker.py, which loads this file by its path: it imports nothing of lrconvert. The structs are those of
include/llama.h. They move between versions and a wrong one is undefined behaviour: what the library calls its defaults
is compared with the known ones before anything else.
"""

import collections
import ctypes
import functools
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

SUPPORTED = "llama.cpp 0.5 or 0.6, as in llama-cpp-python 0.3.36 and xllamacpp 2026.10.11549"

GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: GPU and IGPU
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
    """libllama and ggml: loaded, checked, its functions by name, its last words.

    `fail` gets the reason when an assertion of the library is about to end the process.
    """

    def __init__(self, name, files, fail):
        self.name, self.fail = name, fail
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
        self.fail("llama.cpp aborts: " + " ".join(message.decode(errors="replace").split()))

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
def library_of(name, files, fail):
    return Library(name, files, fail)
