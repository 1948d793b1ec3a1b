"""What Dify's workflows and operators do to a conversation: messages, labels, attributes, priority, team, status."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Body, Depends, HTTPException, Query, Security

from example_app import dialogues
from example_app.api.problems import documented
from example_app.api.security import TokenFirst, bearer
from example_app.clients import get_chatwoot
from example_app.clients.chatwoot import Chatwoot as ChatwootClient
from example_app.db import db
from example_app.schemas import (
    ConversationID,
    CustomAttributes,
    CustomAttributesResult,
    DialogueInfo,
    DifyConversation,
    DifyID,
    LabelsResult,
    MessageSent,
    NewPriority,
    NewStatus,
    NewTeam,
    PriorityResult,
    StatusResult,
    TeamResult,
    TeamsResult,
    Text,
)
from example_app.settings import get_settings
from example_app.teams import directory

router: Final = APIRouter(
    tags=["conversations"],
    route_class=TokenFirst,
    dependencies=[Security(bearer)],  # for the API's description
    responses=documented(400, 401, 404, 413, 422, 502, 503),
)

Chatwoot = Annotated[ChatwootClient, Depends(get_chatwoot)]


_TEAM_LOOKUPS: Final = 2
"""A second one, when the first has found a team that was deleted in Chatwoot, and perhaps made anew."""
LONGEST_IN_A_URL: Final = 5_000
"""Characters, each of up to 12 bytes in a URL; uvicorn takes 64 kB and cuts off longer requests."""


@router.post("/send-chatwoot-message")
async def send_chatwoot_message(
    chatwoot: Chatwoot,
    conversation_id: Annotated[int, Query(ge=1, lt=2**63, examples=[7])],
    message: Annotated[Text, Query(min_length=1, max_length=LONGEST_IN_A_URL, examples=["Hello"])],
    is_private: bool = False,
) -> MessageSent:
    """Post a message into a conversation, or a private note for its agents."""
    await chatwoot.send_message(conversation_id, message, private=is_private)
    return MessageSent()


@router.post("/update-labels/{conversation_id}")
async def update_labels(
    chatwoot: Chatwoot,
    conversation_id: ConversationID,
    labels: Annotated[list[Text], Body(examples=[["parcel", "vip"]])],
) -> LabelsResult:
    """Replace a conversation's labels."""
    return LabelsResult(conversation_id=conversation_id, labels=await chatwoot.set_labels(conversation_id, labels))


@router.post("/update-custom-attributes/{conversation_id}")
async def update_custom_attributes(
    chatwoot: Chatwoot,
    conversation_id: ConversationID,
    custom_attributes: Annotated[CustomAttributes, Body(examples=[{"region": "Berlin"}])],
) -> CustomAttributesResult:
    """Replace a conversation's custom attributes, those that agents have set as well; none at all leaves it alone."""
    if not custom_attributes:
        return CustomAttributesResult(conversation_id=conversation_id, custom_attributes="No custom attrs provided")
    result = await chatwoot.set_custom_attributes(conversation_id, custom_attributes)
    return CustomAttributesResult(conversation_id=conversation_id, custom_attributes=result)


@router.post("/toggle-priority/{conversation_id}")
async def toggle_priority(chatwoot: Chatwoot, conversation_id: ConversationID, new: NewPriority) -> PriorityResult:
    """Set a conversation's priority; none leaves it alone."""
    if new.priority in (None, "none"):
        return PriorityResult(conversation_id=conversation_id, priority="None")
    result = await chatwoot.set_priority(conversation_id, new.priority)
    return PriorityResult(conversation_id=conversation_id, priority=result)


@router.get("/conversations/dify/{dify_conversation_id}")
async def conversation_of_dify(dify_conversation_id: DifyID) -> DifyConversation:
    """The Chatwoot conversation that a Dify conversation answers."""
    dialogue = await dialogues.find_by_dify_conversation(dify_conversation_id)
    if dialogue is None:
        raise HTTPException(404, "There is no dialogue with this Dify conversation.")
    return DifyConversation.model_validate(dialogue)


@router.get("/dialogue-info/{chatwoot_conversation_id}")
async def dialogue_info(chatwoot_conversation_id: ConversationID) -> DialogueInfo:
    """A dialogue as it is stored."""
    dialogue = await dialogues.find_by_conversation(chatwoot_conversation_id)
    if dialogue is None:
        raise HTTPException(404, "There is no dialogue with this Chatwoot conversation.")
    return DialogueInfo.model_validate(dialogue)


@router.post("/refresh-teams")
async def refresh_teams(chatwoot: Chatwoot) -> TeamsResult:
    """Read the teams from Chatwoot again."""
    teams = await directory.refresh(chatwoot)
    return TeamsResult(teams=len(teams), cache_enabled=get_settings().enable_team_cache)


@router.post("/assign-team/{conversation_id}")
async def assign_team(chatwoot: Chatwoot, conversation_id: ConversationID, new: NewTeam) -> TeamResult:
    """Assign a conversation to a team by its name; an empty name leaves it alone.

    A team that is cached and was deleted in Chatwoot is a 404, too, and leaves the conversation without a team.
    """
    if new.team.casefold() in ("", "none"):
        return TeamResult(conversation_id=conversation_id, team="None")
    for _ in range(_TEAM_LOOKUPS):
        if (team := await directory.find(chatwoot, new.team)) is None:
            break
        if (result := await chatwoot.assign_team(conversation_id, team.id)) is not None:
            return TeamResult(conversation_id=conversation_id, team=new.team, team_id=team.id, result=result)
        directory.forget()
    raise HTTPException(404, f"There is no such team. There are: {', '.join(directory.names) or 'none'}.")


@router.post("/toggle-status/{conversation_id}")
async def toggle_status(chatwoot: Chatwoot, conversation_id: ConversationID, new: NewStatus) -> StatusResult:
    """Set a conversation's status."""
    before = await chatwoot.conversation(conversation_id)
    await dialogues.note_workflow_status(conversation_id, new.status)
    await db.release()  # before Chatwoot has it: a step may see it there at once, and the answer may be lost
    result = await chatwoot.set_status(conversation_id, new.status)
    return StatusResult(conversation_id=conversation_id, previous_status=before.status, result=result)
