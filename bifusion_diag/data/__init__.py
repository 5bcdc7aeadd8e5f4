"""Scenes: posed RGB-D images with labelled points, and how they become batches.

====================  ===================================================================================
``scene``             :class:`Scene`, one sample in numpy
``source``            :class:`SceneSource` and :func:`open_source`: where scenes come from
``subset``            :class:`SceneSubset`: some of a source's scenes
``synthetic``         procedural rooms with ground truth
``rgbd``              folders of RGB-D frames
``superpoints``       VCCS over-segmentation
``masks``             2D masks: graph-based segmentation of images, and looking up pixels
``mask_superpoints``  superpoints cut and joined by 2D masks, or given ones
``scene_cache``       built scenes, kept while they fit
``pseudo_labels``     geometric labels for captures that have none
``scannet200``        the class names
``crop``              :func:`crop_scene`: cutting a scene to what a step can hold
``augment``           :class:`Augmentation` of point coordinates
``geometry``          pinhole camera: world to camera to pixel and back
``batch``             :class:`Batch`, scenes concatenated as torch tensors
``loader``            :class:`BatchLoader`, the batch of any step
====================  ===================================================================================
"""

from bifusion_diag.data.augment import Augmentation
from bifusion_diag.data.batch import Batch, collate
from bifusion_diag.data.crop import crop_scene
from bifusion_diag.data.loader import BatchLoader
from bifusion_diag.data.scannet200 import CLASS_NAMES, STUFF_CLASSES, class_id
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.source import SceneSource, open_source
from bifusion_diag.data.subset import SceneSubset

__all__ = [
    "CLASS_NAMES",
    "STUFF_CLASSES",
    "Augmentation",
    "Batch",
    "BatchLoader",
    "Scene",
    "SceneSource",
    "SceneSubset",
    "class_id",
    "collate",
    "crop_scene",
    "open_source",
]
