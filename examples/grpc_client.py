"""Streams one answer from a running server over gRPC."""

import sys

import grpc

from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8500"
with grpc.insecure_channel(address) as channel:
    stub = inference_pb2_grpc.InferenceStub(channel)
    question = inference_pb2.ChatMessage(role="user", content="What is 2+2?")
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[question]),
        sampling=types_pb2.SamplingParams(max_tokens=32, temperature=0),
    )
    for response in stub.Generate(request, timeout=60):
        print(response.text, end="", flush=True)
    print()
