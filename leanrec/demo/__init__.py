from leanrec.demo.clicks import Clicks, draw_clicks
from leanrec.demo.picture import Point
from leanrec.demo.run import Demo, DemoSettings, demo, run_demo

__all__ = ["Clicks", "Demo", "DemoSettings", "Point", "demo", "draw_clicks", "run_demo"]
