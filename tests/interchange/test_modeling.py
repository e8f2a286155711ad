"""Our own class in transformers, loaded from what an export has written: the same logits, the same text.

Needs the extra `hf`.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from model.tools import leaves, on_mesh, random_model, tiny

from bigmac_jax.data.tokenizer import ByteTokenizer
from bigmac_jax.inference import Generator
from bigmac_jax.interchange import export_model, import_model

from .tools import OWN, config_of, of_model, our_logits, tokens_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytestmark = [pytest.mark.full, pytest.mark.usefixtures("own_modules")]


def load(folder: pathlib.Path, **options: Any) -> Any:
    """The model, in evaluation mode; no tensor is missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert type(model).__name__ == "BigMacForCausalLM" and not any(report.values()), report
    return model.eval()


def their_logits(model: Any, tokens_BL: np.ndarray, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BL, dtype=torch.long), **inputs).logits.numpy()


def exported(config: Any, folder: pathlib.Path, given: Any = None, **options: Any) -> Any:
    """A random model on the current mesh, written to `folder`; `given` as for `random_model`."""
    model = random_model(config, given)
    assert export_model(config, model, folder, format="bigmac", **options) == "bigmac"
    return model


@pytest.mark.parametrize("name", [*OWN, "hyper"])
def test_logits(name: str, tmp_path: pathlib.Path) -> None:
    """To 1e-4. With a cache, a token at a time or in parts, they are those of the whole."""
    config = tiny(batch=4, router="hyper", hyper_width=6) if name == "hyper" else config_of(name)
    with on_mesh(config):
        tokens_BL = tokens_of(config)
        ours = our_logits(exported(config, tmp_path / "out"), tokens_BL)
    model = load(tmp_path / "out")
    theirs = their_logits(model, tokens_BL)
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
    assert np.abs(ours).max() > 1
    cache, parts = transformers.DynamicCache(config=model.config), []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        parts.append(their_logits(model, tokens_BL[:, start:end], cache=cache))
    np.testing.assert_allclose(np.concatenate(parts, 1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("latent_norm", ["auto", "none"])
def test_greedy_text(latent_norm: str, tied: bool, tmp_path: pathlib.Path) -> None:
    """100 tokens behind prompts of several lengths, which transformers pads on the left."""
    config = tiny(length=128, num_shared_experts=1, router_scale=2.0, latent_norm=latent_norm, tie_embeddings=tied)
    prompts = ["the state of the union", "a", "we the people of"]
    # Small: what the layers add must count, or a token is followed by itself for ever.
    table = {"embedding_VD": 0.02 * np.random.default_rng(1).standard_normal((264, 16)).astype(np.float32)}
    with on_mesh(config):
        model = exported(config, tmp_path / "out", table, tokenizer=ByteTokenizer())
        ours = [c.tokens for c in Generator(config, model).generate(prompts, max_tokens=100, ignore_eos=True)]
    assert min(len(set(row)) for row in ours) > 5
    theirs, tokenizer = (
        load(tmp_path / "out"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True),
    )
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    theirs.generation_config.eos_token_id = None
    for n, more in ((100, {}), (10, {"use_cache": False}), (10, {"cache_implementation": "static"})):
        out = theirs.generate(**inputs, **more, max_new_tokens=n, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert [tuple(row) for row in out.tolist()] == [row[:n] for row in ours], more
    # Without padding transformers leaves the mask to the model, also where a cache has more room than tokens.
    alone = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    out = theirs.generate(alone, max_new_tokens=10, do_sample=False, cache_implementation="static")
    assert tuple(out[0, alone.shape[1] :].tolist()) == ours[0][:10]


def test_saved_by_transformers(tmp_path: pathlib.Path) -> None:
    """save_pretrained writes the code as well: it loads again, and comes back to us bit-equal."""
    config = config_of("tiny")
    with on_mesh(config):
        ours = exported(config, tmp_path / "out")
        model = load(tmp_path / "out")
        model.save_pretrained(tmp_path / "saved")
        again, copy = import_model(tmp_path / "saved")
    assert of_model(again) == of_model(config)
    jax.tree.map(np.testing.assert_array_equal, leaves(copy), leaves(ours))
    shutil.rmtree(tmp_path / "out")
    twice = load(tmp_path / "saved").state_dict()
    assert twice.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(twice[name], value), name


PROGRAM = """
import json, sys
from transformers import AutoModelForCausalLM, pipeline
generate = pipeline("text-generation", "exported", trust_remote_code=True)
text = generate("we the people", max_new_tokens=20, do_sample=False)[0]["generated_text"]
assert not {"jax", "bigmac_jax"} & set(sys.modules)
print(json.dumps(text))
"""


def test_a_fresh_process_needs_the_folder_alone(tmp_path: pathlib.Path) -> None:
    config = tiny(length=128, num_shared_experts=1)
    with on_mesh(config):
        model = exported(config, tmp_path / "first", tokenizer=ByteTokenizer())
        (completion,) = Generator(config, model).generate(["we the people"], max_tokens=20)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "first", tmp_path / "elsewhere/exported")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == "we the people" + completion.text


def test_half_the_size(tmp_path: pathlib.Path) -> None:
    """In bfloat16 the router stays float32, in the file and in the model."""
    config = config_of("groups")
    with on_mesh(config):
        exported(config, tmp_path / "out", dtype="bfloat16")
    model = load(tmp_path / "out", dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert dtypes.pop("lm_head.weight") == torch.bfloat16
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    assert np.isfinite(their_logits(model.float(), tokens_of(config))).all()


@pytest.mark.parametrize("name", ["normed", "groups", "biased", "paper"])
def test_under_autocast_the_router_stays_float32(name: str, tmp_path: pathlib.Path) -> None:
    """Its products, too; the rest is bfloat16 where torch makes it so."""
    config = config_of(name)
    with on_mesh(config):
        exported(config, tmp_path / "out")
    model, tokens, routed = load(tmp_path / "out"), torch.tensor(tokens_of(config), dtype=torch.long), []
    routers = [module for module in model.modules() if type(module).__name__ == "Router"]
    for router in routers:
        router.register_forward_hook(lambda module, given, found: routed.append((module, *given, *found)))
    expected = model(tokens, labels=tokens).loss
    routed.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, labels=tokens)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and len(routed) == len(routers) > 0
    torch.testing.assert_close(output.loss, expected, atol=0.1, rtol=0.05)
    for router, x_TD, gates_TK, experts_TK in routed[:]:
        gates, experts = router(x_TD)
        assert torch.equal(gates, gates_TK) and torch.equal(experts, experts_TK)


def test_a_loss_and_its_gradients(tmp_path: pathlib.Path) -> None:
    """Labels give the mean cross-entropy; every parameter of the layer takes part in it."""
    config = config_of("tiny")
    with on_mesh(config):
        tokens_BL = tokens_of(config)
        logits = our_logits(exported(config, tmp_path / "out"), tokens_BL)
    model, tokens = load(tmp_path / "out"), torch.tensor(tokens_BL, dtype=torch.long)
    loss = model(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_trainer(tmp_path: pathlib.Path) -> None:
    """It evaluates: logits and labels of every row, and the loss that they give."""
    pytest.importorskip("accelerate")
    config = config_of("tiny")
    with on_mesh(config):
        exported(config, tmp_path / "out")
    model, tokens = load(tmp_path / "out"), torch.tensor(tokens_of(config), dtype=torch.long)
    options = transformers.TrainingArguments(tmp_path / "trained", use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = transformers.Trainer(model, options, eval_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    found = trainer.predict(trainer.eval_dataset)
    np.testing.assert_allclose(found.predictions, their_logits(model, tokens.numpy()), atol=1e-5, rtol=0)
    loss = model(tokens, labels=tokens).loss.item()
    assert abs(trainer.evaluate()["eval_loss"] - loss) < 1e-5 and abs(found.metrics["test_loss"] - loss) < 1e-5


@pytest.mark.parametrize("place", ["call", "config"])
def test_what_an_output_holds(place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the call says, or else the config; what the class does not give is refused."""
    config = config_of("tiny")
    with on_mesh(config):
        exported(config, tmp_path / "out")
    model = load(tmp_path / "out", attn_implementation="eager")  # or transformers refuses output_attentions itself
    tokens = torch.tensor(tokens_of(config), dtype=torch.long)

    def call(part: Any, **options: bool) -> Any:
        if place == "call":
            return part(tokens, **options)
        with monkeypatch.context() as patch:
            for name, value in options.items():
                patch.setattr(model.config, name, value, raising=False)
            return part(tokens)

    for part in (model, model.model):
        whole = part(tokens, use_cache=False)[0]
        one, cache = call(part, return_dict=False)
        assert torch.equal(one, whole) and cache.get_seq_length() == tokens.shape[1]
        states = call(part, output_hidden_states=True).hidden_states
        assert len(states) == config.model.num_layers + 1
        assert torch.equal(states[-1], model.model(tokens).last_hidden_state)
        for name in ("output_attentions", "output_router_logits"):
            with pytest.raises(ValueError, match=f"{name} must be False, in the call and in the config"):
                call(part, **{name: True})
    loss, logits, *_ = model(tokens, labels=tokens, return_dict=False)
    assert loss.ndim == 0 and torch.equal(logits, model(tokens).logits)
    model.config.return_dict, model.config.output_hidden_states = False, True
    assert model(tokens, return_dict=True, output_hidden_states=False).hidden_states is None
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape[1] == tokens.shape[1] + 2


def test_who_sees_whom(tmp_path: pathlib.Path) -> None:
    """By hand: two tokens behind one in the cache. The second row begins with two of padding; they see themselves
    alone, because a softmax over nothing is NaN."""
    config = config_of("tiny")
    with on_mesh(config):
        exported(config, tmp_path / "out")
    module = sys.modules[type(load(tmp_path / "out")).__module__]
    padding = torch.tensor([[1, 1, 1], [0, 0, 1]])
    mask = module.causal_mask(2, 1, padding, padding.device)[:, 0].int().tolist()
    assert mask == [[[1, 1, 0], [1, 1, 1]], [[0, 1, 0], [0, 0, 1]]]
    assert module.causal_mask(2, 1, None, padding.device)[:, 0].int().tolist() == mask[:1]


def test_learned_positions_end(tmp_path: pathlib.Path) -> None:
    config = config_of("dense")
    with on_mesh(config):
        exported(config, tmp_path / "out")
    model = load(tmp_path / "out")
    with pytest.raises(ValueError, match="9 tokens exceed the 8 learned positions"):
        their_logits(model, np.zeros((1, 9)))
