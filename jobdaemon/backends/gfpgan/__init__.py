"""
GFPGAN, face restoration by a neural network.

``weights`` reads the network's file, ``network`` runs it on a device: both need torch and import it only when used, for they run
in a process of their own. ``geometry`` cuts faces out of photos and puts them back; it needs no torch and runs in the daemon.
"""
