"""Scenes: posed RGB-D images with labelled points, and how they become batches.

=====================  ================================================================================
``scene``              :class:`Scene`, one sample in numpy
``geometry``           pinhole camera: world to camera to pixel and back
``batch``              :class:`Batch`, scenes concatenated as torch tensors
=====================  ================================================================================
"""
