"""The main job from one command: one short video three times, dense, with SVG and with AdaSpa, on a small trained model."""
