"""The other job queues, one small file each, all with the command line of `peer.py`."""
