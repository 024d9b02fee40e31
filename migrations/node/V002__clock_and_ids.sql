-- Small functions for days and ids. New objects, and the clock that an outbox may have brought.
--
-- A function in SQL that the planner should put in place of its call can have no search_path of its own.
-- Its body is a RETURN or BEGIN ATOMIC then, which the server resolves when the function is made: no
-- object of a hostile schema can take the place of one that it names. All others set search_path.

-- The one clock of this schema, so that a test can move it. In SQL and without settings of its own,
-- so that the planner puts its body in place of the call. A database with an outbox has it already: its
-- publishers find it at any time.
create or replace function shardmq.clock() returns timestamptz
    language sql volatile
    return clock_timestamp();

create function shardmq.day_of(at timestamptz) returns int
    language sql stable
    return to_char(at at time zone 'UTC', 'YYMMDD')::int;

create function shardmq.day_start(day int) returns timestamptz
    language sql immutable
    return make_timestamp(2000 + day / 10000, day / 100 % 100, day % 100, 0, 0, 0) at time zone 'UTC';

create function shardmq.first_id(partition int, day int) returns bigint
    language sql immutable
    return (partition::bigint * 1000000 + day) * 100000000 + 1;

create function shardmq.table_name(partition int, day int) returns text
    language sql immutable
    return 'batch_' || partition || '_' || lpad(day::text, 6, '0');

-- The days of a partition that have, or may have, messages: closed ones, then the one that takes
-- appends.
create function shardmq.days(p_partition int, p_from int) returns setof int
    language sql stable
    set search_path = pg_catalog, pg_temp
    as $$
        select d.day from shardmq.day d where d.partition = p_partition and d.day >= p_from
        union
        select p.day from shardmq.partition p
         where p.partition = p_partition and p.day >= p_from and p.state <> 'deleted'
        order by 1
    $$;

-- The lock under which a partition is appended to, rolled, sealed or dropped, held to the end of the
-- transaction. What follows in other statements of a read committed transaction sees all that earlier
-- holders committed; in another isolation level it would not.
create function shardmq.lock_partition(p_partition int) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'shardmq: the transaction is %, not read committed',
            current_setting('transaction_isolation')
            using errcode = 'invalid_transaction_state',
                  hint = 'begin isolation level read committed';
    end if;
    perform pg_advisory_xact_lock(1397247313, p_partition);
end $$;
