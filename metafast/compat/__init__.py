"""The calls of other libraries over this library's ops. A script that uses these calls runs with one import changed.

The gradient-based algorithms and their parts are served. Data sets, models and trainers stay with their libraries.

``import metafast.compat.learn2learn as learn2learn``, ``import metafast.compat.higher as higher``.
"""
