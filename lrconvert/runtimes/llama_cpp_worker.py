# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads a GGUF file with llama.cpp and answers logits.

worker_llama.py beside it has the C API of libllama.
"""

import ctypes
import importlib.util
import json
import os
import re
from ctypes import c_int32, c_void_p
from pathlib import Path

import numpy

REMEDY = "pip install 'lrconvert[llama]'"

BATCH = 512  # tokens a call, llama.cpp's own n_ubatch
KV_TYPES = {"f32": 0, "f16": 1}  # enum ggml_type
MMAP = 1  # enum llama_load_mode


def beside(name):
    """A file of this folder, loaded by its path: the folder must not come on sys.path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llama = beside("worker_llama")


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

    def forget_from(self, start):
        """Forget all positions from `start` on."""
        if not self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, start, -1):
            raise RuntimeError(f"llama.cpp can't forget what follows position {start}: {self.lib.errors()}")

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


def fail(reason):
    """An answer before the process ends."""
    loop.ANSWERS.write(json.dumps({"error": reason}) + "\n")
    loop.ANSWERS.flush()


class Worker:
    def __init__(self, request):
        self.folder, self.count = Path(request["folder"]), 0
        if request["gpu_layers"] > 0:
            # cuBLAS reads it when it starts. Float32 products in TF32 would be a thousand times less exact.
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        try:
            self.lib = llama.library_of(request["library"], tuple(request["files"]), fail)
        except llama.Unusable as error:
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
            raise loop.NoDevice(
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
            decoded = iter(context.decode(entries))
            answers = []
            for row, wanted in zip(rows, kept, strict=True):
                found = {index: next(decoded) for index in wanted}
                answers.append([found[index % len(row)] for index in keep])
            return {"logits": self.save(answers), "n_ctx_seq": context.n_ctx_seq}

    def behind(self, request):
        """Logits that predict the last tokens of every row, one row's behind the other's. The prompt is read once; each
        row is forgotten before the next one."""
        prompt, rows, judged = request["prompt"], request["rows"], request["judged"]
        longest = len(prompt) + max(len(row) for row in rows)
        found = []
        with Context(self, request.get("context") or longest, outputs=max(judged)) as context:
            check_capacity(longest, context)
            context.decode(entries_of(prompt, range(len(prompt)), 0, ()))
            for row, count in zip(rows, judged, strict=True):
                where = range(len(prompt), len(prompt) + len(row))
                found += context.decode(entries_of(row, where, 0, range(len(row) - count - 1, len(row) - 1)))
                context.forget_from(len(prompt))
            return {"logits": self.save(found), "n_ctx_seq": context.n_ctx_seq}

    def generate(self, request):
        """Greedy, a token a call."""
        prompt, count, start = request["prompt"], request["new_tokens"], request.get("start") or 0
        places = range(start, start + len(prompt))
        with Context(self, request.get("context") or places.stop + count) as context:
            check_capacity(len(prompt) + count - 1, context)  # what is chosen last is not read
            tokens, rows = [], context.decode(entries_of(prompt, places, 0, {len(prompt) - 1}))
            for position in range(places.stop, places.stop + count):
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
    loop = beside("worker_loop")
    loop.serve(Worker, REMEDY)
