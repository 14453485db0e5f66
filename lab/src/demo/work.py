# What `conet demo` moves, where the machine has Python: it computes, reads a file
# over and over and writes lines, and none of it depends on where or when it runs.
import hashlib
import os
import sys
import time

path, lines = sys.argv[1], int(sys.argv[2])
digest = b"conet"
for line in range(lines):
    for _ in range(6000):
        digest = hashlib.sha256(digest).digest()
    with open(path, "rb") as file:
        file.seek(line * 37 % 4096)
        digest = hashlib.sha256(digest + file.read(1024)).digest()
    with open("/tmp/marker") as file:
        marker = file.read().strip()
    print(line, digest.hex(), os.uname().nodename, marker, flush=True)
    time.sleep(0.02)
sys.exit(37)
