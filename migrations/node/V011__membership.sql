-- Who of a group is where: the session by which a member's process is seen to live, and groups that go
-- with their only consumer. Adds columns that are null or have a constant default: no table is
-- rewritten, a short exclusive lock on each.

alter table shardmq.member
    add column session text;
comment on column shardmq.member.session is
    'The application_name of its process'' listening session here; null where it has none';

alter table shardmq.group_start
    add column broadcast boolean not null default false,
    add column seen_at timestamptz not null default now();
comment on column shardmq.group_start.broadcast is
    'The group of one consumer alone: it goes when that has gone';
comment on column shardmq.group_start.seen_at is
    'When it was made; for a broadcast group, when its consumer was last known to live';
