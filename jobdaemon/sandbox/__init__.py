"""
The sandbox: a provider on this machine that costs nothing, and the referee of what a queue's daemons do to it.

    faults.py    which calls go wrong, by seed
    referee.py   counts starts, overlaps, starts above the limit in force, images stored twice; no sockets
    shop.py      what the image APIs share: keys and their limits, what was bought, links
    files.py     serves what was bought
    openai_images.py  OpenAI's image API
    dashscope.py  DashScope's image API; dashscope_uploads.py  its uploads
    jimeng.py, jimeng_wishes.py, volc_signature.py  Volcengine Jimeng
    superbed.py  Superbed, where photos are put for APIs that fetch them
    photo_enhance.py, photo_enhance_service.py  PhotoEnhanceAI, which retouches photos
    fetching.py  the fetching of such photos
    server.py    all of it behind HTTP on the loopback interface

Knows nothing of databases or settings: what it judges it is told by the calls themselves and by whoever changes limits and
freezes daemons. Nothing but the command line and the tests imports it.
"""

from jobdaemon.sandbox.faults import Faults, parse_faults
from jobdaemon.sandbox.server import Sandbox
from jobdaemon.sandbox.shop import Behaviour

__all__ = ["Behaviour", "Faults", "Sandbox", "parse_faults"]
