"""What of CLIP learns: low-rank updates that are what the paper says, or whole blocks, and nothing else."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrize import remove_parametrizations

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import ClipSettings
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.clip import ClipVisual

D, RANK = 32, 4
PLAIN = ClipSettings(width=D, heads=2, cache_memory=0.0)
LORA = PLAIN.model_copy(update={"tune": "lora", "lora_rank": RANK, "lora_alpha": 6.0})
BLOCKS = PLAIN.model_copy(update={"tune": "blocks", "tune_blocks": 3})


def tower(settings: ClipSettings) -> ClipVisual:
    torch.manual_seed(0)
    return ClipVisual(settings)


def learning(clip: ClipVisual) -> set[str]:
    return {name.removeprefix("visual.") for name, p in clip.named_parameters() if p.requires_grad}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (1, 2, 3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def with_random_updates(clip: ClipVisual) -> ClipVisual:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(generator=generator)
    return clip


def test_low_rank_updates_begin_as_the_identity_to_the_bit(images: torch.Tensor) -> None:
    plain, lora = tower(PLAIN)(images), tower(LORA)
    with torch.no_grad():
        found = lora(images)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.pooled, plain.pooled)
    for parameter in lora.parameters():  # as in a stage that freezes CLIP
        parameter.requires_grad_(False)
    assert torch.equal(lora(images).tokens, plain.tokens)


def test_an_update_is_alpha_over_rank_times_b_a_on_queries_values_and_output(images: torch.Tensor) -> None:
    lora, merged = with_random_updates(tower(LORA)), tower(PLAIN)
    for place in (-2, -1):
        attention = lora.visual.transformer.resblocks[place].attn
        update = attention.parametrizations.in_proj_weight[0]
        (query, value), output = (
            update.up.detach() @ update.down.detach(),
            attention.out_proj.parametrizations.weight[0],
        )
        target = merged.visual.transformer.resblocks[place].attn
        with torch.no_grad():
            target.in_proj_weight[:D] += 6.0 / RANK * query
            target.in_proj_weight[2 * D :] += 6.0 / RANK * value
            target.out_proj.weight += 6.0 / RANK * (output.up[0] @ output.down[0])
    assert torch.linalg.matrix_rank(query) == RANK
    want = merged(images)
    torch.testing.assert_close(lora(images).tokens, want.tokens)
    assert (want.tokens - tower(PLAIN)(images).tokens).abs().max() > 0.1
    for block in lora.visual.transformer.resblocks[-2:]:  # baked in, it is a plain tower again
        remove_parametrizations(block.attn, "in_proj_weight")
        remove_parametrizations(block.attn.out_proj, "weight")
    torch.testing.assert_close(lora(images).tokens, want.tokens)


def test_only_a_and_b_learn_six_matrices_a_block() -> None:
    lora = tower(LORA)
    names = learning(lora)
    assert names == {
        f"transformer.resblocks.{block}.attn.{weight}.0.{matrix}"
        for block in (10, 11)
        for weight in ("parametrizations.in_proj_weight", "out_proj.parametrizations.weight")
        for matrix in ("up", "down")
    }
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 2 * 6 * RANK * D
    frozen = sum(p.numel() for p in lora.parameters() if not p.requires_grad)
    assert frozen == sum(p.numel() for p in tower(PLAIN).parameters())


def test_the_last_blocks_and_the_final_layer_norm_learn() -> None:
    names = learning(tower(BLOCKS))
    assert {name.rpartition(".resblocks.")[2].partition(".")[0] for name in names} == {"9", "10", "11", "ln_post"}
    assert len(names) == 3 * 12 + 2


def test_more_blocks_than_there_are_is_an_error() -> None:
    with pytest.raises(UserError, match=r"tune_blocks: 13 .* ViT-B-16 has 12"):
        tower(PLAIN.model_copy(update={"tune": "lora", "tune_blocks": 13}))


def test_all_blocks_may_learn(images: torch.Tensor) -> None:
    clip = tower(PLAIN.model_copy(update={"tune": "blocks", "tune_blocks": 12, "cache_memory": 1.0}))
    assert torch.equal(clip(images).tokens, clip(images).tokens)
    clip(images).tokens.sum().backward()
    assert clip.visual.transformer.resblocks[0].mlp.c_fc.weight.grad is not None
    assert clip.visual.conv1.weight.grad is None


def test_low_rank_updates_leave_the_other_random_numbers_as_they_are() -> None:
    tower(PLAIN)
    after_plain = torch.get_rng_state()
    one, two = tower(LORA), tower(LORA)
    assert torch.equal(torch.get_rng_state(), after_plain)
    down = "visual.transformer.resblocks.11.attn.parametrizations.in_proj_weight.0.down"
    assert torch.equal(one.state_dict()[down], two.state_dict()[down])
    torch.manual_seed(1)
    assert not torch.equal(ClipVisual(LORA).state_dict()[down], one.state_dict()[down])


@pytest.mark.parametrize("settings", [LORA, BLOCKS], ids=["lora", "blocks"])
def test_gradients_are_those_of_the_whole_tower_whether_the_prefix_is_kept_or_not(
    settings: ClipSettings, images: torch.Tensor
) -> None:
    towers = [with_random_updates(tower(settings.model_copy(update={"cache_memory": m}))) for m in (0.0, 1.0)]
    weight = torch.randn(2, D, 14, 14, generator=torch.Generator().manual_seed(2))
    gradients = []
    for clip in towers:
        for _ in range(2):  # the second time from the cache
            clip.zero_grad()
            (clip(images).tokens * weight).sum().backward()
        gradients.append({name: p.grad for name, p in clip.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {f"visual.{name}" for name in learning(towers[0])}
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])

    whole = towers[0]
    whole.zero_grad()
    whole.visual.output_tokens = True
    _, tokens = whole.visual(whole.prepare(images))  # open_clip's own forward, all images at once
    (tokens.transpose(1, 2).reshape(2, D, 14, 14) * weight).sum().backward()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(gradient / scale, whole.get_parameter(name).grad / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [LORA, BLOCKS], ids=["lora", "blocks"])
def test_frozen_by_a_stage_it_keeps_no_graph_and_released_only_the_tail_runs(
    settings: ClipSettings, images: torch.Tensor
) -> None:
    clip = tower(settings.model_copy(update={"cache_memory": 1.0}))
    ran: list[int] = []
    for number, block in enumerate(clip.visual.transformer.resblocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    tuned = [p for p in clip.parameters() if p.requires_grad]
    for parameter in tuned:
        parameter.requires_grad_(False)
    for _ in range(2):
        assert not clip(images).tokens.requires_grad
    assert ran == [*range(12)] * 2  # once each for two images: the whole tower is kept
    for parameter in tuned:
        parameter.requires_grad_(True)
    clip(images)
    ran.clear()
    assert clip(images).tokens.requires_grad
    assert ran == [*range(12 - settings.tune_blocks, 12)] * 2
    with torch.no_grad():
        assert not clip(images).tokens.requires_grad
    assert not clip.training
    assert not any(module.training for module in clip.train().modules())


@pytest.mark.parametrize("settings", [LORA, BLOCKS], ids=["lora", "blocks"])
def test_a_step_of_the_optimiser_changes_the_tokens(settings: ClipSettings, images: torch.Tensor) -> None:
    clip = tower(settings.model_copy(update={"cache_memory": 1.0}))
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=1e-2)
    before = clip(images).tokens
    before.square().sum().backward()
    frozen = {name: p.clone() for name, p in clip.named_parameters() if not p.requires_grad}
    optimizer.step()
    assert not torch.equal(clip(images).tokens, before)
    assert all(torch.equal(clip.get_parameter(name), value) for name, value in frozen.items())


def test_weights_are_loaded_before_the_updates_are_put_on(
    monkeypatch: pytest.MonkeyPatch, images: torch.Tensor
) -> None:
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16}}
    config["vision_cfg"]["patch_size"] = 8
    config["text_cfg"] = {"layers": 1, "width": 32, "heads": 2, "vocab_size": 8, "context_length": 4}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: deepcopy(config))
    source = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).visual
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, "visual.safetensors")
    stored = {"architecture": "tiny", "weights": "visual.safetensors"}
    plain = tower(PLAIN.model_copy(update=stored))
    lora = tower(LORA.model_copy(update=stored))
    assert lora.provenance == plain.provenance
    with torch.no_grad():
        assert torch.equal(lora(images).tokens, plain(images).tokens)


@pytest.mark.parametrize(
    ("tune", "learns"), [("lora", 2 * 6 * 8 * 768), ("blocks", 2 * (12 * 768**2 + 13 * 768) + 2 * 768)]
)
def test_at_full_size_the_parts_count_what_learns(tune: str, learns: int) -> None:
    with torch.device("meta"):
        size = build_model(load_settings("bifusion", overrides=[f"model.clip.tune={tune}"])).part_sizes()[
            "encoder.clip"
        ]
    assert size.trainable == learns
    assert size.total == 86_192_640 + (learns if tune == "lora" else 0)
