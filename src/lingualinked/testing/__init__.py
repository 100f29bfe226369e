"""For tests of code that uses sharded models: a pytest plugin, and a cluster whose devices can be made to fail.

pytest loads the plugin at every start, so importing it loads neither torch nor zmq nor transformers.
"""
