# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads an ONNX folder with ONNX Runtime and answers logits.

Prompts go in one call while that fits, as a user's program sends them. A longer one goes in parts: then two constants
of the graph become inputs, in memory: how long the sequence gets, which chooses its tier, and how many logits are
wanted.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np

REMEDY = "pip install 'lrconvert[onnx]'"
GRAPH = "onnx/model.onnx"
ADJUSTABLE = ("num_logits_to_keep", "sequence_length")
# Beyond this, logits and attention scores of one call would fill a machine's memory.
MOST_BYTES = 2 * 2**30
PART = 1024
KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Worker:
    def __init__(self, request):
        import onnxruntime

        self.ort, self.request, self.folder = onnxruntime, request, Path(request["folder"])
        self.path = Path(request["artifact"]) / GRAPH
        self.cuda = request["device"].startswith("cuda")
        if self.cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise loop.NoDevice("this onnxruntime has no CUDA provider; onnxruntime-gpu has one")
        self.count, self.parts = 0, None
        self.whole = self.session(str(self.path))
        if self.cuda and "CUDAExecutionProvider" not in self.whole.get_providers():  # it falls back and says nothing
            raise loop.NoDevice(f"--device {request['device']}: ONNX Runtime finds no such GPU")
        inputs = {each.name: each for each in self.whole.get_inputs()}
        self.caches = {name: each for name, each in inputs.items() if name.startswith("past_key_values.")}
        self.vocab = self.whole.get_outputs()[0].shape[-1]
        self.info = {
            "onnxruntime": onnxruntime.__version__,
            "class": "InferenceSession",
            "device": self.card() if self.cuda else "cpu",
            "dtype": request["dtype"],
        }

    def card(self):
        """The name of the GPU, as far as something on this machine knows it."""
        try:
            import torch

            return torch.cuda.get_device_name()
        except (ImportError, RuntimeError, AssertionError):
            return self.request["device"]

    def session(self, model, folder=None):
        ort = self.ort
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self.request.get("threads"):
            options.intra_op_num_threads = self.request["threads"]
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if self.request.get("placements"):
            options.enable_profiling = True
            options.profile_file_prefix = str(self.folder / "profile")
        providers = ["CPUExecutionProvider"]
        if self.cuda:
            number = self.request["device"].partition(":")[2] or "0"
            # TF32 has 10 bits of mantissa: float32 that is worth the name does without.
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": number, "use_tf32": "0"}))
        return ort.InferenceSession(model, options, providers=providers)

    def adjustable(self):
        """The same graph with its constants as inputs."""
        if self.parts is None:
            import onnx

            model = onnx.load(str(self.path), load_external_data=False)
            for name in ADJUSTABLE:
                model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, []))
            self.parts = self.session(model.SerializeToString(), str(self.path.parent))
        return self.parts

    def save(self, array):
        name = f"{self.count}.npy"
        self.count += 1
        np.save(self.folder / name, array)
        return name

    # --- calls -------------------------------------------------------------------------------------------

    def value(self, array, kind):
        """bfloat16 has no NumPy dtype: it goes through as bits."""
        if kind == "tensor(bfloat16)":
            return self.ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.astype(np.uint16), 16)
        if kind in KINDS:
            array = array.astype(KINDS[kind])
        return self.ort.OrtValue.ortvalue_from_numpy(array)

    def empty(self, rows):
        """The caches of a sequence that has not begun."""
        return {
            name: self.value(np.zeros([rows, each.shape[1], 0, each.shape[3]], np.uint16), each.type)
            for name, each in self.caches.items()
        }

    def call(self, ids, mask, positions, caches, session=None, **more):
        """Logits [rows, tokens, vocab], and the caches afterwards."""
        session = session or self.whole
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **more}
        values = {name: self.value(np.asarray(array, np.int64), "int64") for name, array in feed.items()}
        names = [output.name for output in session.get_outputs()]
        device = "cuda" if self.cuda else "cpu"
        binding = session.io_binding()
        for name, value in {**values, **caches}.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu" if name == "logits" else device)
        session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs(), strict=True))
        logits = found.pop("logits").numpy()
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}

    def prompt(self, row, positions, keep, length=None):
        """Logits of one sequence at the indices `keep`, and its caches; in the tier of `length` tokens, where more will
        follow."""
        count = len(row)
        positions = list(range(count)) if positions is None else positions
        needed = 4 * count * max(self.vocab, 0 if self.request["fused"] else self.request["heads"] * count)
        if needed <= MOST_BYTES and length is None:
            logits, caches = self.call([row], [[1] * count], [positions], self.empty(1))
            return logits[0][keep], caches
        caches, found = self.empty(1), {}
        for start in range(0, count, PART):
            stop = min(start + PART, count)
            wanted = [index for index in keep if start <= index < stop]
            first = min(wanted, default=stop - 1)
            logits, caches = self.call(
                [row[start:stop]], [[1] * stop], [positions[start:stop]], caches, self.adjustable(),
                num_logits_to_keep=stop - first, sequence_length=length or max(positions) + 1,
            )  # fmt: skip
            found.update({index: logits[0][index - first] for index in wanted})
        return np.stack([found[index] for index in keep]), caches

    # --- requests -------------------------------------------------------------------------------------

    def logits(self, request):
        rows, positions = request["rows"], request["positions"]
        if len(rows) == 1:
            keep = [index % len(rows[0]) for index in request["keep"]]
            return {"logits": self.save(self.prompt(rows[0], positions, keep)[0][None])}
        longest = max(len(row) for row in rows)
        missing = [longest - len(row) for row in rows]
        ids = [[0] * gap + row for gap, row in zip(missing, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row) for gap, row in zip(missing, rows, strict=True)]
        where = [[max(0, index - gap) for index in range(longest)] for gap in missing]
        logits, _ = self.call(ids, mask, where, self.empty(len(rows)))
        parts = [
            answer[[index + gap if index >= 0 else index for index in request["keep"]]]
            for answer, gap in zip(logits, missing, strict=True)
        ]
        return {"logits": self.save(np.stack(parts))}

    def behind(self, request):
        """Logits that predict the last tokens of every row, one row's behind the other's. The prompt is read once, and
        every row goes on from its caches. All have one tier: that of `length` tokens, where the prompt's is another."""
        prompt = request["prompt"]
        _, caches = self.prompt(prompt, None, [len(prompt) - 1], request["length"])
        found = []
        for row, count in zip(request["rows"], request["judged"], strict=True):
            stop = len(prompt) + len(row)
            logits, _ = self.call([row], [[1] * stop], [list(range(len(prompt), stop))], caches)
            found.append(logits[0][len(row) - count - 1 : -1])
        return {"logits": self.save(np.concatenate(found))}

    def generate(self, request):
        """Greedy. With `boundaries`, a sequence that grows past one of them is recomputed: its cached keys were rotated
        for another tier."""
        sequence, count, start = list(request["prompt"]), request["new_tokens"], request.get("start") or 0
        boundaries = set(request.get("boundaries") or ())

        def whole():
            return self.prompt(sequence, list(range(start, start + len(sequence))), [len(sequence) - 1])

        kept, caches = whole()
        answers = [kept[0]]
        while len(answers) < count:
            sequence.append(int(answers[-1].argmax()))
            length = len(sequence)
            if start + length - 1 in boundaries:
                kept, caches = whole()
                answers.append(kept[0])
                continue
            logits, caches = self.call([sequence[-1:]], [[1] * length], [[start + length - 1]], caches)
            answers.append(logits[0][-1])
        tokens = [*sequence[len(request["prompt"]) :], int(answers[-1].argmax())]
        return {"tokens": tokens, "logits": self.save(np.stack(answers))}

    def placements(self, request):
        """Operators that ran on the CPU and made floats, though another device was asked for, of the calls so far."""
        sessions = [session for session in (self.whole, self.parts) if session is not None]
        profiles = [Path(session.end_profiling()).read_text(encoding="utf-8") for session in sessions]
        events = [event for profile in profiles for event in json.loads(profile)]
        found = set()
        for event in events:
            about = event.get("args", {})
            if about.get("provider") == "CPUExecutionProvider":
                kinds = [kind for output in about.get("output_type_shape", ()) for kind in output]
                if any("float" in kind or "double" in kind for kind in kinds):
                    found.add(f"{about.get('op_name')} ({event.get('name', '')})")
        return {"operators": sorted(found)}

    def function(self, request):
        """cos and sin of the graph's rotary function for positions [n] of one sequence, of which the largest
        chooses the tier; float32, [n, d/2] each."""
        import onnx
        from onnx import TensorProto, helper

        model = onnx.load(str(self.path), load_external_data=False)
        call = next(node for node in model.graph.node if node.domain == "lrconvert")
        kind = TensorProto.FLOAT  # before the graph rounds them
        next(attribute for attribute in call.attribute if attribute.name == "to").i = kind
        given = [helper.make_tensor_value_info(call.input[0], TensorProto.INT64, ["batch", "length"])]
        outputs = [helper.make_tensor_value_info(name, kind, ["batch", "length", None]) for name in call.output]
        zero = [each for each in model.graph.initializer if each.name == call.input[1]]
        graph = helper.make_graph([call], "rotary", given, outputs, zero)
        alone = helper.make_model(
            graph, functions=list(model.functions), opset_imports=list(model.opset_import), ir_version=model.ir_version
        )
        positions = np.array([request["positions"]], np.int64)
        if request.get("evaluator"):
            from onnx.reference import ReferenceEvaluator

            cos, sin = ReferenceEvaluator(alone).run(None, {call.input[0]: positions})
        else:
            cos, sin = self.session(alone.SerializeToString()).run(None, {call.input[0]: positions})
        return {"cos": self.save(cos[0].astype(np.float32)), "sin": self.save(sin[0].astype(np.float32))}

    def evaluated(self, request):
        """Logits of one sequence at `keep` by onnx.reference.ReferenceEvaluator: another implementation of the same
        operators. For graphs of standard operators only."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        row, keep = request["rows"][0], request["keep"]
        evaluator = ReferenceEvaluator(onnx.load(str(self.path)))
        feed = {
            "input_ids": np.array([row], np.int64),
            "attention_mask": np.ones([1, len(row)], np.int64),
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
        }
        for name, each in self.caches.items():
            feed[name] = np.zeros([1, each.shape[1], 0, each.shape[3]], KINDS[each.type])
        (logits,) = evaluator.run(["logits"], feed)
        return {"logits": self.save(logits[:1, keep])}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker_loop", Path(__file__).with_name("worker_loop.py"))
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.serve(Worker, REMEDY)
