"""Other libraries' calls over this library's ops: a script that uses what is here runs with one import changed.

Served are the gradient-based algorithms and what they are made of; data sets, models and trainers stay with their libraries.

``import metafast.compat.learn2learn as learn2learn``, ``import metafast.compat.higher as higher``.
"""
