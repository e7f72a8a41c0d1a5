"""The head-host daemon: it alone starts, drains, stops and powers the workers of autoscaled pools.

config     what Ansible rendered: hosts, pools, limits, paths
connection one host's agent over SSH, with a deadline on everything
record     what was promised to Ray and what is under way, on disk before it is done
view       what the hosts said last
policy     which host comes next, and which may go off: pure
explain    one line for each host: its state, since when, and why it does not come: pure
actor      carries one host from one phase to the next
daemon     ties them together
server     the Unix socket
power/     none, wol, ipmi, redfish
"""
