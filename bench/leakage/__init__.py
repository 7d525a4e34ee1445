"""What the server can read out of what it is sent: published attacks on updates, each at its own strength.

The attacker is an honest but curious server. It knows base model, global adapter, codec, side information, the local
recipe and the channel, and has public text of the clients' kind, of which it makes updates of its own to set its
thresholds by; it never sees the truth. ``victim`` has who is attacked, ``channels`` what of an update the server sees,
``span`` and ``sequences`` the exact attacks on a layer's inputs, ``matching`` the continuous one, ``inverter`` the one
that learns, ``membership`` the one on the trained adapter, ``scores`` what a success is, ``page`` how it is told.
"""
