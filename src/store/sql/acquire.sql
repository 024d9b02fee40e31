-- Takes free partitions of a topic: those without a member, those whose member's lease has ended, and
-- those of members that have died, by what others saw of them: unless their session is seen here, or the
-- server is not up for as long as a lease. Rows locked by others are passed over. Each acquisition draws
-- a new owner and raises the epoch, so that what an earlier owner sends later is refused.
-- $1 id of the topic  $2 group  $3 member  $4 partitions  $5 whether ended leases may be taken
-- $6 members that have died  $7 lease in seconds  $8 members that are dead for certain
with live as (
    select m.member, m.session from shardmq.member m where shardmq.is_live(m)),
dead as (
    select m.member from live m
     where m.member = any ($8::uuid[])
        or m.member = any ($6::uuid[])
       and not exists (select from pg_stat_activity s
                        where s.datname = current_database() and s.application_name = m.session)
       and pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => $7::float8)),
seen as materialized (
    select c.partition, c.epoch
      from shardmq.cursor c join shardmq.partition p using (partition)
     where c.group_name = $2 and p.topic_id = $1 and p.state <> 'deleted'
       and c.partition = any ($4::int[])
       and (c.member is null
            or $5::bool and not exists (select from live where live.member = c.member)
            or exists (select from dead where dead.member = c.member))
       and exists (select from live where live.member = $3)),
-- Whoever took one since this snapshot has raised its epoch, and may be live without being in it.
free as (
    select c.partition, c.owner as owner_before, c.member as member_before
      from seen join shardmq.cursor c
        on c.group_name = $2 and c.partition = seen.partition and c.epoch = seen.epoch
     order by c.partition
       for no key update of c skip locked)
update shardmq.cursor c
   set member = $3, owner = gen_random_uuid(), epoch = c.epoch + 1
  from free
 where c.group_name = $2 and c.partition = free.partition
returning c.partition, c.owner, c.epoch, c.reset_epoch, c.acked_id, c.acked_ahead::text,
          pg_postmaster_start_time(), free.owner_before, free.member_before
