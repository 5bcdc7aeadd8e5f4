"""Every setting of a run, typed, documented and range-checked where it is owned.

A preset (``presets/*.yaml``) is a set of differences from the defaults below; see :mod:`bifusion_diag.config.presets`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Metres = PositiveNumber

#: The first so many semantic classes are stuff, without objects: ScanNet200's wall and floor.
STUFF_CLASSES = 2


class Strict(BaseModel):
    """Unknown keys are errors, values are checked again when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, frozen=True)


class BackboneSettings(Strict):
    """The sparse U-Net (Res16UNet of MinkowskiNet; Choy et al., CVPR 2019)."""

    layers: tuple[Positive, ...] = Field((2, 2, 2, 2, 2, 2, 2, 2), min_length=8, max_length=8)
    planes: tuple[Positive, ...] = Field((32, 64, 128, 256, 128, 128, 96, 96), min_length=8, max_length=8)
    init_dim: Positive = 32
    first_kernel: Literal[3, 5] = 5
    bn_momentum: Share = 0.02
    voxel_size: Metres = 0.05


class ClipSettings(Strict):
    """The 2D branch: a frozen open_clip visual tower and its projection heads."""

    use: bool = Field(True, description="false: no 2D branch at all, for fusion 'simple' (001, plan A)")
    architecture: str = "ViT-B-16"
    weights: str = Field("random", description="'random', a local file, or an open_clip pretrained tag")
    width: Positive = Field(768, description="width of the tower; not 768 = a narrower tower of random weights")
    heads: Positive = 12
    head_hidden: Positive = 512
    head_dropout: Share = 0.0
    head_batchnorm: bool = False
    tune: Literal["none", "lora", "blocks"] = Field(
        "none",
        description="what of the tower learns: nothing, low-rank updates of the last blocks' attention (Hu et al., "
        "ICLR 2022), or the last blocks whole with the final LayerNorm",
    )
    tune_blocks: Positive = Field(2, description="how many of the tower's last blocks learn")
    lora_rank: Positive = 8
    lora_alpha: PositiveNumber = Field(16.0, description="the update is scaled by lora_alpha / lora_rank")
    cache_memory: NonNegative = Field(1.0, description="memory for the frozen part's tokens [GiB]; 0 = off")
    cache_folder: str | None = Field(
        None, description="folder that keeps the frozen part's tokens and the text features between runs; null = none"
    )


class ProjectionSettings(Strict):
    """3D points to 2D pixels."""

    depth_tolerance: Metres = Field(0.05, description="ε of |depth(u,v) − z| < ε")
    sanitize: Literal["strict", "replace", "clamp", "none"] = Field(
        "strict",
        description="non-finite camera coordinates: 'strict' = the point is not valid; the other three are the "
        "documents' ways: 'replace' = the untransformed points are used; 'clamp' = torch.clamp to ±1e6, which keeps "
        "NaN; 'none' = nothing is done",
    )
    normalize: Literal["before_sampling", "after_sampling"] = Field(
        "before_sampling",
        description="L2-normalise the feature map, or the sampled features (points out of view are zero vectors)",
    )
    coordinates: Literal["captured", "augmented"] = Field(
        "captured",
        description="'captured' = as the camera saw them; 'augmented' = a mistake to be found: the points as "
        "flips, rotation and scale have moved them, for which images and poses no longer hold",
    )


class GateSettings(Strict):
    """The learned gates: LiteFusionGate, and EnhancedFusionGate with its attention over neighbours."""

    hidden: Positive = Field(64, description="width of the MLP of α; 'enhanced' takes four times as much")
    early_steps: int = Field(3000, ge=0, description="α = 0.5 with frozen weights for so many of `reference_steps`")
    invalid_alpha: Share = 0.1
    neighbours: Positive = Field(8, description="enhanced: nearest points of the scene that a point attends to")
    heads: Positive = Field(8, description="enhanced: heads of the attention; must divide the common width")


class Mask3DSettings(Strict):
    """What only Mask3D's decoder has (Schult et al., ICRA 2023)."""

    queries: Positive = Field(100, description="queries a scene, picked among its voxels by farthest point sampling")
    keys: tuple[Positive, ...] = Field(
        (200, 800, 3200, 12800),
        min_length=1,
        max_length=5,
        description="the U-Net's scales that a layer attends to, coarsest first: voxels of a scene drawn in training",
    )
    gauss_scale: PositiveNumber = Field(1.0, description="standard deviation of the Fourier encoding's frequencies")


class DecoderSettings(Strict):
    """The query decoder: ESAM's mixed one, OneFormer3D's (``masks: superpoint``) or Mask3D's (``kind: mask3d``)."""

    kind: Literal["superpoint_queries", "mask3d"] = "superpoint_queries"
    layers: Positive = Field(3, description="mask3d: rounds over all scales, with the same weights")
    width: Positive = 256
    heads: Positive = 8
    hidden: Positive = 1024
    dropout: Share = 0.0
    masks: Literal["mixed", "superpoint"] = Field(
        "mixed", description="'mixed' = the later half over points (ESAM), 'superpoint' = all over superpoints"
    )
    instance_classes: Positive = Field(
        1,
        description="1 = class-agnostic; `semantic_classes` = object class c is semantic class c (Mask3D); "
        "`semantic_classes` − 2 = without wall and floor (OneFormer3D: 198 of ScanNet200)",
    )
    semantic_classes: Positive = 200
    score_head: bool = False
    box_head: bool = False
    learnable_queries: int = Field(0, ge=0)
    text_queries: bool = Field(False, description="one query a semantic class, from the text features of its name")
    query_share: Share = Field(
        0.5, description="training draws between this share and all of the superpoints as queries"
    )
    mask3d: Mask3DSettings = Mask3DSettings()

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> DecoderSettings:
        if self.width % self.heads:
            raise ValueError(f"decoder.width {self.width} is not a multiple of decoder.heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _object_classes_are_semantic_classes(self) -> DecoderSettings:
        allowed = [1, self.semantic_classes, self.semantic_classes - STUFF_CLASSES]
        if self.instance_classes not in allowed:
            raise ValueError(
                f"decoder.instance_classes {self.instance_classes} must be 1 (class-agnostic), {allowed[1]} (every "
                f"semantic class) or {allowed[2]} (without wall and floor)"
            )
        return self

    @model_validator(mode="after")
    def _mask3d_has_its_own_queries(self) -> DecoderSettings:
        if self.kind == "mask3d":
            if self.masks != "superpoint":
                raise ValueError("decoder.kind 'mask3d' has masks over superpoints: set decoder.masks=superpoint")
            wanted = ("text_queries", "learnable_queries", "score_head", "box_head")
            if extra := [name for name in wanted if getattr(self, name)]:
                raise ValueError(f"decoder.kind 'mask3d' has no {' and no '.join(extra)}: switch it off")
            if self.width % 2:
                raise ValueError(f"decoder.width {self.width} is odd: mask3d's encoding is half sines, half cosines")
        return self

    @property
    def first_object_class(self) -> int:
        """The semantic class of object class 0, unless the classes are agnostic."""
        return self.semantic_classes - self.instance_classes


class InferenceSettings(Strict):
    """How instances are read out of the predictions."""

    candidates: Positive = Field(500, description="best pairs of query and class that enter matrix NMS")
    max_instances: Positive = Field(100, description="instances kept a scene")
    mask_threshold: Share = Field(0.5, description="probability above which a point is in a mask")
    min_score: Share = Field(0.0, description="instances must score more; a copy of a better mask scores 0")
    min_points: Positive = Field(10, description="fewest points of an instance")
    semantic_confidence: Share = Field(
        0.0, description="a superpoint whose class is less probable has no semantics; see `diffusion_radius`"
    )


class ModelSettings(Strict):
    """Which model, and the sizes of its parts."""

    fusion: Literal["none", "lite", "simple", "enhanced"] = Field(
        "lite",
        description="'none' is the 3D baseline; 'lite' a learned gate; 'simple' the mean of 2D and 3D, or 3D alone "
        "with clip.use=false; 'enhanced' a gate with attention over neighbours",
    )
    common_width: Positive = Field(
        256, description="C: width of the fused point features (the baseline keeps the U-Net's)"
    )
    sparse_engine: Literal["auto", "native", "minkowski"] = "auto"
    init_from: str | None = Field(
        None,
        description="a file of weights to begin with: ESAM, OneFormer3D, Mask3D, a Res16UNet alone, or an earlier "
        "run's state.safetensors; what does not fit begins fresh",
    )
    pooling: Literal["geometry", "mean"] = Field(
        "geometry", description="points to superpoints: ESAM's geometry-aware pooling, or the plain mean (OneFormer3D)"
    )
    film_hidden: Positive = 128
    backbone: BackboneSettings = BackboneSettings()
    clip: ClipSettings = ClipSettings()
    projection: ProjectionSettings = ProjectionSettings()
    gate: GateSettings = GateSettings()
    decoder: DecoderSettings = DecoderSettings()
    inference: InferenceSettings = InferenceSettings()
    diffusion_radius: NonNegative = Field(
        0.5,
        description="points without semantics get those of the nearest superpoint with some within this distance [m]; "
        "0 = background",
    )

    @property
    def uses_clip(self) -> bool:
        """The model has a 2D branch."""
        return self.fusion != "none" and self.clip.use

    @model_validator(mode="after")
    def _fusion_has_what_it_fuses(self) -> ModelSettings:
        if self.fusion in ("lite", "enhanced") and not self.clip.use:
            raise ValueError(
                f"fusion '{self.fusion}' weighs CLIP's features, and clip.use is false; "
                "take fusion 'simple' or 'none', or set clip.use to true"
            )
        if self.clip.tune != "none" and not self.uses_clip:
            raise ValueError(
                f"clip.tune '{self.clip.tune}' lets parts of CLIP learn, and this model has no CLIP; set clip.tune to "
                "'none'"
            )
        if self.fusion == "enhanced" and self.common_width % self.gate.heads:
            raise ValueError(f"common_width {self.common_width} is not a multiple of gate.heads {self.gate.heads}")
        return self

    @model_validator(mode="after")
    def _mask3d_reads_the_scales_of_the_baselines_unet(self) -> ModelSettings:
        if self.decoder.kind == "mask3d" and self.fusion != "none":
            raise ValueError(
                "decoder.kind 'mask3d' reads the scales of the 3D baseline's U-Net: set model.fusion=none, or take "
                "decoder.kind=superpoint_queries"
            )
        return self


class SemanticLossSettings(Strict):
    """Cross-entropy over the semantic classes on superpoint and text queries. Mask3D's decoder has no such head."""

    weight: NonNegative = 0.4


class InstanceLossSettings(Strict):
    """The instance loss and its matcher."""

    style: Literal["unified", "esam", "mask3d"] = "unified"
    weight: NonNegative = 1.0
    parts: tuple[NonNegative, ...] = Field(
        (1.0, 0.8, 0.2),
        description="unified: [class, mask, objectness]; esam: [class, BCE, Dice, score, box]; "
        "mask3d: [class, BCE, Dice]",
    )
    no_object_weight: NonNegative = 0.1
    focal_alpha: Share = 0.25
    focal_gamma: NonNegative = 2.0
    mask_bce_share: Share = Field(0.6, description="unified: mask loss = share · BCE + (1 − share) · Dice")
    matcher: Literal["sparse", "hungarian"] = Field(
        "sparse",
        description="'sparse' = each object's `match_topk` cheapest queries among those inside it (ESAM); "
        "'hungarian' = the cheapest one-to-one assignment of all queries (Mask3D)",
    )
    match_class: NonNegative = 0.5
    match_bce: NonNegative = 1.0
    match_dice: NonNegative = 1.0
    match_topk: Positive = 1
    empty_match: Literal["zero", "nan"] = Field(
        "zero", description="an object that no query matches: 'zero' skips it, 'nan' averages over nothing as ESAM does"
    )

    @model_validator(mode="after")
    def _parts_fit_style(self) -> InstanceLossSettings:
        expected = {"unified": 3, "esam": 5, "mask3d": 3}[self.style]
        if len(self.parts) != expected:
            raise ValueError(f"instance.parts has {len(self.parts)} weights; style '{self.style}' takes {expected}")
        return self


class ClipAlignSettings(Strict):
    """−log(σ(cos/τ) + 1e-8) between 2D and 3D features."""

    weight: NonNegative = 0.1
    target: Literal["point", "global"] = "point"
    temperature: PositiveNumber = 0.07
    gradient_flow: Share = Field(0.05, description="share of the gradient let through to the 2D side; 0 cuts the graph")
    gradient_formula: Literal["as_declared", "as_written"] = Field(
        "as_declared",
        description="'as_declared' = f·r + f.detach()·(1 − r), which lets r pass; 'as_written' = 003's code for 5 %, "
        "0.95·f + 0.05·f.detach(): a mistake to be found, 1 − r gets through",
    )
    clamp: PositiveNumber | None = Field(
        None, description="features of both sides are clamped to ± this before the cosine (002: 10); null = off"
    )


class SpatialConsistencySettings(Strict):
    """Feature similarity of each point with its nearest neighbours."""

    weight: NonNegative = 0.05
    neighbours: Positive = 8
    max_points: Positive = Field(4096, description="points drawn a step, to bound the neighbour search")


class NoViewSettings(Strict):
    """Points without a valid view learn from confident neighbours that have one."""

    weight: NonNegative = 0.05
    confidence: Share = 0.8
    radius: Metres = 0.3
    max_points: Positive = 4096


class LossSettings(Strict):
    """All loss terms and the schedule of their weights.

    ``constant`` uses each term's own weight. ``staged`` and ``progressive_clip`` replace the group weights (semantic,
    instance, clip, aux) by those of the schedule; within ``aux``, the two terms keep the proportion of their weights.
    """

    schedule: Literal["constant", "staged", "progressive_clip"] = "staged"
    semantic: SemanticLossSettings = SemanticLossSettings()
    instance: InstanceLossSettings = InstanceLossSettings()
    clip_align: ClipAlignSettings = ClipAlignSettings()
    spatial_consistency: SpatialConsistencySettings = SpatialConsistencySettings()
    no_view: NoViewSettings = NoViewSettings()


class OptimSettings(Strict):
    """AdamW and its learning-rate schedule."""

    lr: PositiveNumber = 2e-4
    weight_decay: NonNegative = 0.05
    clip_grad: float | None = Field(
        10.0, gt=0.0, allow_inf_nan=False, description="maximum total L2 norm of the gradient; null = off"
    )
    schedule: Literal["constant", "poly"] = "poly"
    poly_power: PositiveNumber = 0.9
    clip_lr_scale: PositiveNumber = Field(
        0.01,
        description="CLIP's learning rate as a share of `lr` where the documents ask for a very low one: stage P2 of "
        "'three_phase'. In every other stage in which CLIP learns, it learns at `lr`",
    )


class TrainingSettings(Strict):
    """The loop."""

    steps: Positive = 200
    batch_size: Positive = Field(4, description="scenes a step; the documents use 8, which needs about 8 GiB")
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1', ...")
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of torch; 0 = torch's own choice. Small models run best on 1"
    )
    stages: Literal["none", "heads_first", "three_phase"] = Field(
        "heads_first",
        description="which parts learn when: 'heads_first' = S0, S1, S2 of document 003; 'three_phase' = phase 3 of "
        "document 000 (3D alone, CLIP at a very low rate, everything). true stands for 'heads_first', false for 'none'",
    )
    reference_steps: Positive = Field(
        33_000, description="the documents' run length; their counts are scaled by steps/this"
    )
    checkpoint_every: int = Field(
        0, ge=0, description="steps between checkpoints; 0 = only at the end and on interruption"
    )
    keep_checkpoints: int = Field(
        2, ge=0, description="newest checkpoints kept; a replay of the run begins at one. 0 = every one"
    )
    fingerprint_every: int = Field(
        10, ge=0, description="steps between digests of the weights, which a replay is held to; 0 = none"
    )
    inject: tuple[str, ...] = Field(
        (), description="faults on purpose, NAME@STEP[:WHERE] each; `bifusion-diag train --inject list` lists them"
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _stages_were_a_switch(cls, value: object) -> object:
        """Earlier settings and records hold true or false."""
        return {True: "heads_first", False: "none"}[value] if isinstance(value, bool) else value


class IncidentSettings(Strict):
    """What happens at a bad step."""

    policy: Literal["record", "skip", "rollback", "stop"] = Field(
        "record",
        description="'record' does the update all the same; 'skip' leaves it out, unless its gradients are good; "
        "'rollback' goes back to a state of some steps before; 'stop' ends the run before it",
    )
    capsules: int = Field(10, ge=0, description="incidents kept as capsules that can be replayed; 0 = none")
    capsule_limit: str = Field("2 GB", description="largest capsule, for example '500 MB'")
    rules: tuple[str, ...] = Field((), description="further alarms, for example 'loss/clip_align > 10'")
    keep_every: Positive = Field(10, description="of 'rollback': steps between the states that are kept")


class EvaluationSettings(Strict):
    """Metrics on scenes that the run does not train on."""

    every: int = Field(
        0, ge=0, description="steps between evaluations; the first is of the untrained model. 0 = no evaluation"
    )
    source: str | None = Field(
        None,
        description="'synthetic' or a folder of RGB-D frames; null = synthetic rooms of their own where the run trains "
        "on synthetic rooms, else the scenes that `holdout` keeps",
    )
    masks: str | None = Field(
        None, description="as `data.masks`, for the frames of `source`; null = `data.masks` where that is 'graph'"
    )
    scenes: Positive = Field(8, description="scenes evaluated, spread evenly over a larger source")
    holdout: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the source's scenes, the last ones, that training leaves out"
    )
    max_points: Positive | None = Field(
        None, description="points kept of a scene, at random but always the same; null = `data.max_points`"
    )
    min_region: Positive | None = Field(
        None,
        description="fewest points of an object in AP; null = ScanNet's 100 at its density: 100 for every 20,000 of "
        "`max_points`",
    )


class AugmentSettings(Strict):
    """Augmentation of the points, as in ESAM. It never touches what the projection uses."""

    flip: Share = 0.5
    rotate: bool = True
    scale: tuple[PositiveNumber, PositiveNumber] = Field((0.8, 1.2), description="smallest and largest factor")
    translate_std: NonNegative = 0.1
    elastic: Share = 0.5

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentSettings:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augment.scale {self.scale} must be the smallest factor, then the largest")
        return self


class FlawSettings(Strict):
    """Flaws of real captures in synthetic rooms: the chance that a scene has each. All off by default."""

    lost_tracking: Share = Field(0.0, description="one view's pose is −inf, as ScanNet marks it")
    far_outliers: Share = Field(0.0, description="a few points hundreds of metres away")
    colour_outliers: Share = Field(0.0, description="colours outside [0, 255]")
    wrong_extrinsics: Share = Field(0.0, description="one view's pose belongs to another place")
    empty_crop: Share = Field(0.0, description="only a handful of points are left")
    single_instance: Share = Field(0.0, description="the scene has one labelled instance")
    no_instance: Share = Field(0.0, description="the scene has no labelled instance")


class GraphMaskSettings(Strict):
    """Graph-based image segmentation (Felzenszwalb and Huttenlocher, IJCV 2004)."""

    scale: PositiveNumber = Field(100.0, description="k on colours of 0..255: larger prefers larger segments")
    sigma: NonNegative = Field(0.5, description="[px] of the smoothing; 0.5 in the authors' program, 0.8 in the paper")
    min_size: Positive = Field(50, description="[px] smaller segments join a neighbour")


class DataSettings(Strict):
    """Where scenes come from and how they are cut."""

    source: str = Field("synthetic", description="'synthetic' or a folder of RGB-D frames")
    scenes: Positive = Field(64, description="synthetic: number of different rooms")
    exclude: tuple[str, ...] = Field(
        (), description="names of scenes that training leaves out; all others come in the order they would have had"
    )
    views: Positive = Field(1, description="images a scene")
    point_views: Positive = Field(1, description="views that points come from; more than `views` leaves points unseen")
    image_height: Positive = 240
    image_width: Positive = 320
    max_points: Positive = Field(20_000, description="points kept a scene, as in ESAM's single-view data")
    crop_size: Metres = Field(6.4, description="side of the cube that a training crop keeps")
    superpoint_size: Metres = Field(0.25, description="seed distance of VCCS")
    superpoint_voxel: Metres = 0.04
    superpoints: Literal["vccs", "masks", "files"] = Field(
        "vccs", description="VCCS; VCCS relabelled by 2D masks; or ids from the frames' superpoints/ folder"
    )
    masks: str = Field(
        "graph", description="of superpoints=masks: 'graph' segments the colour images; or a folder of label PNGs"
    )
    graph_masks: GraphMaskSettings = GraphMaskSettings()
    augment: AugmentSettings = AugmentSettings()
    flaws: FlawSettings = FlawSettings()

    @model_validator(mode="after")
    def _masks_are_used(self) -> DataSettings:
        if self.masks != "graph" and self.superpoints != "masks":
            raise ValueError(
                f"data.masks '{self.masks}' has no effect with data.superpoints={self.superpoints}: set "
                "data.superpoints=masks"
            )
        return self


class Settings(Strict):
    """All settings of a run."""

    preset: str = "bifusion"
    scale: Literal["full", "small"] = "full"
    model: ModelSettings = ModelSettings()
    losses: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    training: TrainingSettings = TrainingSettings()
    incidents: IncidentSettings = IncidentSettings()
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
