-- Which member of a group consumes which partition, agreed upon here; and what members tell of each
-- other. Adds columns that are null or have constant defaults, and new objects: no table is rewritten,
-- a short exclusive lock on member and consumer_group.

alter table shardmq_control.consumer_group
    add column broadcast boolean not null default false,
    add column created_at timestamptz not null default now();
comment on column shardmq_control.consumer_group.broadcast is
    'The group of one consumer alone: it goes when that has gone';

alter table shardmq_control.member
    add column lease_secs float8 not null default 10,
    add column only_partitions int[],
    add column unreachable int[] not null default '{}',
    add column avoid int[] not null default '{}',
    add column session text,
    add column gone_at timestamptz,
    add column left_at timestamptz,
    add column died boolean not null default false;
comment on table shardmq_control.member is
    'Consumers, among which the partitions of a topic are divided';
comment on column shardmq_control.member.only_partitions is
    'The partitions that it was told to take; null where it takes a share of all';
comment on column shardmq_control.member.unreachable is
    'Nodes that it does not reach: the others look whether they do';
comment on column shardmq_control.member.avoid is
    'Nodes that it has not reached for so long that their partitions go to others, if any reaches them';
comment on column shardmq_control.member.session is
    'The application_name of its process'' listening session here; null where it has none';
comment on column shardmq_control.member.gone_at is
    'When others left it out, since it was silent for two thirds of its lease or has died; null again with
     its next heartbeat';
comment on column shardmq_control.member.left_at is
    'When it left by itself, for good: the row stays for an hour, so that no heartbeat which arrives late
     makes the member again';
comment on column shardmq_control.member.died is
    'Its session was gone too: its leases need not be waited for';

create table shardmq_control.assignment (
    topic text not null,
    group_name text not null,
    version bigint not null,
    basis text not null,
    members uuid[] not null,
    partitions int[] not null,
    owners int[] not null check (cardinality(owners) = cardinality(partitions)),
    primary key (topic, group_name),
    foreign key (topic, group_name) references shardmq_control.consumer_group on delete cascade
);
comment on column shardmq_control.assignment.basis is
    'What it was computed from, in short: members, what they take and reach, partitions';
comment on column shardmq_control.assignment.owners is
    'For each partition the place of its owner in members, from 1; 0 where it has none';

-- Members of the group look at once, also for a seek: whoever moves cursors notifies by himself.
create function shardmq_control.tell_group() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
    as $$
declare
    changed record := coalesce(new, old);
begin
    perform pg_notify('shardmq_group', changed.topic || ' ' || changed.group_name);
    return null;
end $$;
create trigger tell_group after insert on shardmq_control.member
    for each row when (new.left_at is null)
    execute function shardmq_control.tell_group();
create trigger tell_group_of_swept after delete on shardmq_control.member
    for each row when (old.left_at is null)
    execute function shardmq_control.tell_group();
create trigger tell_group_of_gone after update on shardmq_control.member
    for each row when (old.gone_at is distinct from new.gone_at)
    execute function shardmq_control.tell_group();
create trigger tell_group after insert or update on shardmq_control.assignment
    for each row execute function shardmq_control.tell_group();
