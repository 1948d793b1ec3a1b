"""Chatdify: answers Chatwoot's conversations with Dify, and hands them to humans when Dify fails."""
