# SPDX-License-Identifier: Apache-2.0
"""Runs in an interpreter of its own: loads a Hugging Face folder with transformers and answers logits."""

import importlib.util
from pathlib import Path

REMEDY = "pip install 'lrconvert[hf]'"
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**28}  # held at once where tokens are scored


class Worker:
    def __init__(self, request):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        self.torch, self.folder = torch, Path(request["folder"])
        name, _, number = request["device"].partition(":")
        if name == "cuda" and int(number or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
            raise loop.NoDevice(f"--device {request['device']}: the PyTorch of this interpreter sees no such GPU")
        dtype = getattr(torch, request["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            request["artifact"], trust_remote_code=request["custom"], dtype=dtype, use_safetensors=True
        )
        self.model = self.model.to(request["device"]).eval()
        self.device = self.model.device
        self.count = 0
        self.info = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "class": type(self.model).__name__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "dtype": request["dtype"],
        }

    def rest(self):
        """A long prompt's memory goes back to the GPU, where the reference computes next."""
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()

    def save(self, tensor):
        import numpy

        name = f"{self.count}.npy"
        self.count += 1
        numpy.save(self.folder / name, tensor.float().cpu().numpy())
        return name

    def given(self, rows, positions):
        """What the model is called with: rows padded on the left, as generate passes them."""
        torch = self.torch
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        place = {"device": self.device, "dtype": torch.long}
        given = {"input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows], **place)}
        if positions is not None or len(rows) > 1:
            # One plain row needs neither, and a mask of 64k x 64k would not fit.
            own = torch.arange(longest, **place) - longest + torch.tensor(lengths, **place)[:, None]
            given["attention_mask"] = (own >= 0).long()
            given["position_ids"] = own.clamp(min=0) if positions is None else torch.tensor([positions], **place)
        return given

    def logits(self, request):
        torch = self.torch
        rows = request["rows"]
        longest = max(len(row) for row in rows)
        given = self.given(rows, request["positions"])
        # Kept indices count from the start of each row's own tokens; logits_to_keep is one list for all.
        keep = [[i + longest - len(row) if i >= 0 else i + longest for i in request["keep"]] for row in rows]
        wanted = sorted({index for row in keep for index in row})
        with torch.inference_mode():
            logits_to_keep = torch.tensor(wanted, device=self.device)
            out = self.model(**given, logits_to_keep=logits_to_keep, use_cache=False).logits
        column = {index: at for at, index in enumerate(wanted)}
        parts = [out[row][[column[index] for index in indices]] for row, indices in enumerate(keep)]
        return {"logits": self.save(torch.stack(parts))}

    def score(self, request):
        """Losses and choices of the last tokens of every row, one row's behind the other's."""
        torch = self.torch
        rows, judged = request["rows"], request["judged"]
        given = self.given(rows, None)
        losses, preferred = [], []
        with torch.inference_mode():
            hidden = self.model.get_decoder()(**given, use_cache=False).last_hidden_state
            head = self.model.get_output_embeddings()
            size = max(1, MAX_LOGITS[self.device.type] // head.weight.shape[0])
            # Rows end together; the hidden state before a token predicts it.
            states = torch.cat([row[-count - 1 : -1] for row, count in zip(hidden, judged, strict=True)])
            targets = torch.cat([row[-count:] for row, count in zip(given["input_ids"], judged, strict=True)])
            for part, wanted in zip(states.split(size), targets.split(size), strict=True):
                logits = head(part).float()
                losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
                preferred.append(logits.argmax(-1) == wanted)
        return {"losses": self.save(torch.cat(losses)), "preferred": self.save(torch.cat(preferred))}

    def behind(self, request):
        """Losses and choices of the last tokens of every row, each behind the same prompt, which is read once."""
        import transformers

        torch, cache = self.torch, transformers.DynamicCache()
        losses, preferred = [], []
        with torch.inference_mode():
            prompt = torch.tensor([request["prompt"]], device=self.device)
            # Through the whole model: an artifact's own code notes the cache's tier there.
            self.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for row, count in zip(request["rows"], request["judged"], strict=True):
                ids = torch.tensor([row], device=self.device)
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                logits = out.logits[0, -count - 1 : -1].float()
                wanted = ids[0, -count:]
                losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
                preferred.append(logits.argmax(-1) == wanted)
                cache.crop(-len(row))
        return {"losses": self.save(torch.cat(losses)), "preferred": self.save(torch.cat(preferred))}

    def generate(self, request):
        torch = self.torch
        prompt = torch.tensor([request["prompt"]], device=self.device)
        count = request["new_tokens"]
        out = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=count,
            min_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        tokens = out.sequences[0, len(request["prompt"]) :].tolist()
        return {"tokens": tokens, "logits": self.save(torch.cat(out.logits))}


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("worker_loop", Path(__file__).with_name("worker_loop.py"))
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.serve(Worker, REMEDY)
