"""The embedded cloud: stand-ins on loopback that the official clients talk to.

Each module simulates one server, says in its docstring what it simulates and what it does not, and refuses
(404, 405, 422, 501) what it does not know: an ignored request never answers 200.
"""
