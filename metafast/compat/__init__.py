"""Other libraries' calls over this library's ops: a script written for one of them runs with one import changed.

``import metafast.compat.learn2learn as learn2learn``, ``import metafast.compat.higher as higher``.
"""
