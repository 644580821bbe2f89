"""The main job from one command: one short video four times, dense, with SVG, with AdaSpa and with Auto, on a small trained model."""
